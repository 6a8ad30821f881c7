"""Bugs of the settings: options that are silently ignored or read as something else (T44), lengths that disagree (T45)."""

from tests.mutants.mutant import Mutant

_GOLDEN = "tests/config/test_config_bad_input.py::test_the_block_is_the_kept_one"
_LOAD = "tests/config/test_config_load.py"

MUTANTS = [
    Mutant(trap="T44", name="unknown settings are ignored", file="halfbyte/config/base.py",
           find='extra="forbid"', replace='extra="ignore"', test=f"{_GOLDEN}[unknown_key_in_group]"),
    Mutant(trap="T44", name="settings without effect are accepted", file="halfbyte/config/run.py",
           find="run_problems(self) + inert_problems(self)", replace="run_problems(self)", test=f"{_GOLDEN}[rank_under_full]"),
    Mutant(trap="T44", name="double quantization of int8 is accepted and does nothing", file="halfbyte/config/inert.py",
           find='lambda run: run.quant_format == "int8"', replace="lambda run: False", test=f"{_GOLDEN}[double_quant_on_int8]"),
    Mutant(trap="T44", name="clashes between settings are not reported", file="halfbyte/config/rules.py",
           find="broken = (clash for clash in RUN_CLASHES if clash.broken(run))", replace="broken = iter(())",
           test=f"{_GOLDEN}[lora_with_nf4]"),
    Mutant(trap="T44", name="the command line does not win over the file", file="halfbyte/config/load.py",
           find="            target[name] = value", replace="            target.setdefault(name, value)",
           test=f"{_LOAD}::test_command_line_beats_file_beats_default"),
    Mutant(trap="T44", name="the first of two values on the command line is dropped in silence", file="halfbyte/config/load.py",
           find="if dotted in given and given[dotted] != leaf:", replace="if False:", test=f"{_GOLDEN}[override_twice]"),
    Mutant(trap="T44", name="a learning rate 1e-4 is a text", file="halfbyte/config/yaml_text.py",
           find="return float(text) if len(text) < 40 and NUMBER.match(text) else text", replace="return text",
           test=f"{_LOAD}::test_words_are_read_as_yaml_1_2[1e-4-0.0001]"),
    Mutant(trap="T44", name="yes is read as true", file="halfbyte/config/base.py",
           find="Switch = Annotated[bool, Strict()]", replace="Switch = Annotated[bool, Field()]", test=f"{_GOLDEN}[yes_for_true]"),
    Mutant(trap="T44", name="true is read as the number 1", file="halfbyte/config/base.py",
           find="if isinstance(value, bool) and bool not in kinds:", replace="if False:", test=f"{_GOLDEN}[true_for_a_number]"),
    Mutant(trap="T44", name="of a key given twice the last one wins", file="halfbyte/config/yaml_text.py",
           find="        if word in values:", replace="        if False:", test=f"{_GOLDEN}[duplicate_key]"),
    Mutant(trap="T44", name="a written run folder loses a setting", file="halfbyte/config/write.py",
           find='if f"{name}.{inner}" not in resting}', replace='if f"{name}.{inner}" not in resting and inner != "layers"}',
           test="tests/config/test_config_load.py::test_every_setting_survives_writing"),
    Mutant(trap="T45", name="a warm-up longer than the training is accepted", file="halfbyte/config/rules.py",
           find="run.optim.warmup_steps >= run.train.max_steps", replace="False", test=f"{_GOLDEN}[warmup_longer_than_run]"),
    Mutant(trap="T45", name="epochs beside max_steps are ignored in silence", file="halfbyte/config/inert.py",
           find="lambda run: run.train.max_steps is not None", replace="lambda run: False", test=f"{_GOLDEN}[length_twice]"),
    Mutant(trap="T45", name="an optimizer step of a broken number of micro-batches is accepted", file="halfbyte/config/rules.py",
           find="run.train.global_batch_size % run.train.micro_batch_size != 0", replace="False", test=f"{_GOLDEN}[batches_do_not_divide]"),
    Mutant(trap="T44", name="a rank that cannot be saved after init pissa is accepted", file="halfbyte/config/rules.py",
           find="2 * max([lora.rank, *lora.ranks.values()]) > RANK_LIMIT", replace="False",
           test=f"{_GOLDEN}[rank_that_pissa_cannot_double]"),
]  # fmt: skip
