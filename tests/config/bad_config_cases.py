"""Bad settings, one per case: the text of run.yaml (None: no file), overrides and flags.

Their printed blocks are in tests/golden/bad_config.

`python -m tests.config.bad_config_cases` writes the blocks anew; read the difference before keeping it.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.config import load_config
from halfbyte.errors import ConfigError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bad_config"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\n"


@dataclass(frozen=True)
class Case:
    text: str | bytes | None = None
    overrides: Sequence[str] = ()
    flags: Mapping[str, object] = field(default_factory=dict)
    kind: str = "file"  # file, missing, folder, unreadable


CASES: dict[str, Case] = {
    # the file itself
    "missing_file": Case(kind="missing"),
    "folder_given": Case(kind="folder"),
    "over_one_megabyte": Case("# " + "x" * 1_000_000),
    "utf16": Case("data: rows.jsonl\n".encode("utf-16")),
    "latin1": Case("data: r\xe9sum\xe9.jsonl\n".encode("latin-1")),
    "control_character": Case("data: rows\x07.jsonl\n"),
    "tab_indentation": Case("data: rows.jsonl\nlora:\n\trank: 8\n"),
    "unclosed_bracket": Case("data: rows.jsonl\nlora: {rank: 8\nmethod: lora\n"),
    "colon_in_value": Case("data: rows.jsonl\nout: runs: first\n"),
    "unclosed_quote": Case('data: "rows.jsonl\nmethod: lora\n'),
    "alias_bomb": Case(BOMB),
    "python_tag": Case('data: !!python/object/apply:os.system ["true"]\n'),
    "two_documents": Case("data: rows.jsonl\n---\ndata: other.jsonl\n"),
    "deep_nesting": Case("data: " + "[" * 400 + "]" * 400 + "\n"),
    "too_many_values": Case("data: rows.jsonl\nmodel: {labels: [" + "a, " * 120_000 + "b]}\n"),
    "list_at_top": Case("- data: rows.jsonl\n"),
    "word_at_top": Case("rows.jsonl\n"),
    "key_is_a_list": Case("[a, b]: 3\n"),
    "duplicate_key": Case("data: rows.jsonl\nlora:\n  rank: 8\n  alpha: 16\n  rank: 16\n"),
    "duplicate_group": Case("data: rows.jsonl\nlora: {rank: 8}\nlora: {alpha: 16}\n"),
    # one setting
    "empty_file": Case(""),
    "nothing_given": Case(),
    "unknown_key_top": Case("data: rows.jsonl\nlearnig_rate: 1e-4\n"),
    "unknown_key_in_group": Case("data: rows.jsonl\noptim:\n  learnig_rate: 1e-4\n"),
    "unknown_key_of_another_program": Case("data: rows.jsonl\nlora_r: 8\n"),
    "unknown_key_with_no_likeness": Case("data: rows.jsonl\nlora: {xyzzy: 8}\n"),
    "misplaced_key": Case("data: rows.jsonl\nrank: 8\n"),
    "word_for_a_number": Case("data: rows.jsonl\nlora: {rank: many}\n"),
    "fraction_for_a_whole_number": Case("data: rows.jsonl\nlora: {rank: 8.5}\n"),
    "yes_for_true": Case("data: rows.jsonl\nlora: {rslora: yes}\n"),
    "one_for_true": Case("data: rows.jsonl\nlora: {rslora: 1}\n"),
    "true_for_a_number": Case("data: rows.jsonl\ntrain: {epochs: true}\n"),
    "number_for_a_text": Case("data: rows.jsonl\nout: 2026\n"),
    "text_for_a_list": Case("data: rows.jsonl\nlora: {fully_trained: lm_head}\n"),
    "list_for_a_number": Case("data: rows.jsonl\nlora: {rank: [8, 16]}\n"),
    "nothing_for_a_number": Case("data: rows.jsonl\nlora:\n  rank:\n"),
    "group_is_a_number": Case("data: rows.jsonl\nlora: 8\n"),
    "rank_zero": Case("data: rows.jsonl\nlora: {rank: 0}\n"),
    "rank_too_large": Case("data: rows.jsonl\nlora: {rank: 5000}\n"),
    "rank_in_pattern": Case("data: rows.jsonl\nlora:\n  ranks:\n    q_proj: -1\n"),
    "alpha_zero": Case("data: rows.jsonl\nlora: {alpha: 0}\n"),
    "alpha_over_its_limit": Case("data: rows.jsonl\nlora: {alpha: 2e6}\n"),
    "dropout_one": Case("data: rows.jsonl\nlora: {dropout: 1.0}\n"),
    "learning_rate_zero": Case("data: rows.jsonl\noptim: {learning_rate: 0}\n"),
    "learning_rate_three": Case("data: rows.jsonl\noptim: {learning_rate: 3}\n"),
    "learning_rate_nan": Case("data: rows.jsonl\noptim: {learning_rate: .nan}\n"),
    "learning_rate_infinite": Case("data: rows.jsonl\noptim: {learning_rate: .inf}\n"),
    "learning_rate_text": Case('data: rows.jsonl\noptim: {learning_rate: "1e-"}\n'),
    "beta_one": Case("data: rows.jsonl\noptim: {betas: [0.9, 1.0]}\n"),
    "three_betas": Case("data: rows.jsonl\noptim: {betas: [0.9, 0.99, 0.999]}\n"),
    "epochs_zero": Case("data: rows.jsonl\ntrain: {epochs: 0}\n"),
    "batch_zero": Case("data: rows.jsonl\ntrain: {global_batch_size: 0}\n"),
    "checkpoints_zero": Case("data: rows.jsonl\ntrain: {keep_checkpoints: 0}\n"),
    "seed_negative": Case("data: rows.jsonl\ntrain: {seed: -1}\n"),
    "max_tokens_one": Case("data: {path: rows.jsonl, max_tokens: 1}\n"),
    "blocksize_100": Case("data: rows.jsonl\nquant: {blocksize: 100}\n"),
    "empty_path": Case('data: ""\n'),
    "float16": Case("data: rows.jsonl\nmodel: {name: starter, dtype: float16}\n"),
    "unknown_method": Case("data: rows.jsonl\nmethod: qlra\n"),
    "unknown_schedule": Case("data: rows.jsonl\noptim: {schedule: cosin}\n"),
    "unknown_format": Case("data: rows.jsonl\nquant: {format: 4bit}\n"),
    "unknown_tracker": Case("data: rows.jsonl\ntrain: {trackers: [wandbb]}\n"),
    "escape_codes_in_value": Case('data: rows.jsonl\nmethod: "\\e[31mred\\e[0m"\n'),
    # settings that exclude each other
    "qlora_without_quantization": Case("data: rows.jsonl\nmethod: qlora\nquant: {format: none}\n"),
    "lora_with_nf4": Case("data: rows.jsonl\nmethod: lora\nquant: {format: nf4}\n"),
    "full_with_int8": Case("data: rows.jsonl\nmethod: full\nquant: {format: int8}\n"),
    "loftq_on_dense": Case("data: rows.jsonl\nmethod: lora\nlora: {init: loftq}\n"),
    "loftq_on_int8": Case("data: rows.jsonl\nquant: {format: int8}\nlora: {init: loftq}\n"),
    "head_quantized_and_skipped": Case("data: rows.jsonl\nquant: {quantize_head: true, skip: [lm_head]}\n"),
    "dora_with_bias": Case("data: rows.jsonl\nlora: {dora: true, lora_bias: true}\n"),
    "bias_with_pissa": Case("data: rows.jsonl\nlora: {init: pissa, lora_bias: true}\n"),
    "rank_that_pissa_cannot_double": Case("data: rows.jsonl\nlora: {init: pissa, ranks: {q_proj: 2049}}\n"),
    "alpha_that_pissa_cannot_double": Case("data: rows.jsonl\nlora: {init: pissa, alpha: 6e5}\n"),
    "layer_twice": Case("data: rows.jsonl\nlora: {layers: [0, 1, 1]}\n"),
    "no_targets": Case("data: rows.jsonl\nlora: {targets: []}\n"),
    "packing_a_classifier": Case("data: {path: rows.jsonl, packing: true}\nmodel: {task: sequence-classification}\n"),
    "classifier_on_conversations": Case("data: {path: rows.jsonl, shape: messages}\nmodel: {task: sequence-classification}\n"),
    "labels_without_classifier": Case("data: {path: rows.jsonl, shape: classification}\n"),
    "one_label": Case("data: rows.jsonl\nmodel: {task: sequence-classification, labels: [spam]}\n"),
    "label_twice": Case("data: rows.jsonl\nmodel: {task: sequence-classification, labels: [spam, ham, spam]}\n"),
    "eval_is_train": Case("data: {path: rows.jsonl, eval_path: rows.jsonl}\n"),
    "warmup_longer_than_run": Case("data: rows.jsonl\noptim: {warmup_steps: 100}\ntrain: {max_steps: 100}\n"),
    "batches_do_not_divide": Case("data: rows.jsonl\ntrain: {micro_batch_size: 3, global_batch_size: 16}\n"),
    "early_stop_without_eval": Case("data: rows.jsonl\ntrain: {early_stop_patience: 3, eval_every_steps: null}\n"),
    "early_stop_without_rows": Case("data: {path: rows.jsonl, eval_rows: 0}\ntrain: {early_stop_patience: 3}\n"),
    "rollback_without_checkpoints": Case("data: rows.jsonl\ntrain: {on_nan: rollback, save_every_steps: null}\n"),
    "tracker_twice": Case("data: rows.jsonl\ntrain: {trackers: [wandb, wandb]}\n"),
    # settings without effect
    "rank_under_full": Case("data: rows.jsonl\nmethod: full\nlora: {rank: 8}\n"),
    "lora_plus_under_full": Case("data: rows.jsonl\nmethod: full\noptim: {lora_plus_ratio: 16}\n"),
    "blocksize_without_quantization": Case("data: rows.jsonl\nmethod: lora\nquant: {blocksize: 128}\n"),
    "double_quant_on_int8": Case("data: rows.jsonl\nquant: {format: int8, double_quant: true}\n"),
    "loftq_rounds_without_loftq": Case("data: rows.jsonl\nlora: {loftq_iterations: 3}\n"),
    "final_share_under_constant": Case("data: rows.jsonl\noptim: {schedule: constant, final_lr_share: 0.5}\n"),
    "warmup_twice": Case("data: rows.jsonl\noptim: {warmup_share: 0.1, warmup_steps: 10}\n"),
    "length_twice": Case("data: rows.jsonl\ntrain: {epochs: 2, max_steps: 50}\n"),
    "embedding_rate_without_embeddings": Case("data: rows.jsonl\noptim: {embedding_lr: 1e-5}\n"),
    "labels_of_a_writer": Case("data: rows.jsonl\nmodel: {labels: [spam, ham]}\n"),
    "template_of_a_classifier": Case("data: rows.jsonl\nmodel: {task: sequence-classification, template: chat.jinja}\n"),
    "turns_of_plain_text": Case("data: {path: rows.jsonl, shape: text, train_on: all}\n"),
    "label_field_of_messages": Case("data: {path: rows.jsonl, shape: messages, label_field: kind}\n"),
    "eval_rows_beside_eval_file": Case("data: {path: rows.jsonl, eval_path: held.jsonl, eval_rows: 50}\n"),
    "best_without_eval": Case("data: rows.jsonl\ntrain: {keep_best: true, eval_every_steps: null}\n"),
    "kept_checkpoints_without_any": Case("data: rows.jsonl\ntrain: {keep_checkpoints: 3, save_every_steps: null}\n"),
    # the command line
    "override_without_equals": Case("data: rows.jsonl\n", overrides=("lora.rank",)),
    "override_without_key": Case("data: rows.jsonl\n", overrides=("=8",)),
    "override_unknown_key": Case("data: rows.jsonl\n", overrides=("lora.rnk=8",)),
    "override_out_of_range": Case("data: rows.jsonl\n", overrides=("lora.rank=0",)),
    "override_bad_list": Case("data: rows.jsonl\n", overrides=("lora.targets=[q_proj",)),
    "override_twice": Case("data: rows.jsonl\n", overrides=("lora.rank=8", "lora.rank=16")),
    "override_into_a_number": Case("data: rows.jsonl\n", overrides=("lora.rank.deep=8",)),
    "flag_and_override_disagree": Case("data: rows.jsonl\n", overrides=("model=other",), flags={"model.name": "starter"}),
    # several at once
    "several_problems": Case(
        "data: rows.jsonl\nmethd: qlora\nlora:\n  rank: 0\n  dora: yes\noptim:\n  learning_rate: 3\ntrain: {early_stop_patience: 2, "
        "eval_every_steps: null}\n", overrides=("train.seed=-1",)),
    "more_than_twenty": Case("data: rows.jsonl\nlora:\n" + "".join(f"  key_{number}: 1\n" for number in range(25))),
}  # fmt: skip


def block(case: Case, folder: Path) -> str:
    """What is printed for a case, with the folder's name taken out; raises AssertionError when the settings are accepted."""
    path: Path | None = folder / "run.yaml"
    assert path is not None
    if case.kind == "folder":
        path.mkdir()
    elif case.text is None and case.kind == "file":
        path = None
    elif case.text is not None:
        path.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    try:
        load_config(path, case.overrides, case.flags)
    except ConfigError as error:
        return str(error).replace(str(folder) + os.sep, "") + "\n"
    raise AssertionError("the settings were accepted")


def main() -> None:
    """Write every block, and remove those of cases that are gone."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / f"{name}.txt").write_text(block(case, Path(folder)), encoding="utf-8")
    for path in GOLDEN.glob("*.txt"):
        if path.stem not in CASES:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


if __name__ == "__main__":
    main()
