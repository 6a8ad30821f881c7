"""Bugs put into the plan on purpose: a plan that is wrong says "fits" where it does not.  T0: none of the listed traps."""

from tests.mutants.mutant import Mutant

_MEMORY = "halfbyte/plan/memory.py"
_KEPT = "tests/plan/test_plan_activations.py::"
_BYTES = "tests/plan/test_plan_memory.py::"
_FITS = "tests/plan/test_plan_search.py::"

MUTANTS = [
    Mutant("T56", "the plan packs the head", _MEMORY,
           'kinds = ("linear", "experts", "head") if setting.quantize_head else ("linear", "experts")',
           'kinds = ("linear", "experts", "head")', _BYTES + "test_static_parts_of_an_8b_model"),
    Mutant("T62", "the plan trains a tied head twice", "halfbyte/plan/setting.py",
           "return tuple(size for weight in shape.weights for size in _tensors(weight) if not weight.tied)",
           "return tuple(size for weight in shape.weights for size in _tensors(weight))", _BYTES + "test_full_trains_each_weight_once"),
    Mutant("T53", "the plan forgets the scales of the scales", "halfbyte/quant/storage_cost.py",
           "scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + NESTED_CODEBOOK_BYTES + 4 if", "scales = blocks if",
           _BYTES + "test_bytes_of_a_real_model"),
    Mutant("T44", "the plan sees no fp32 masters", _MEMORY, 'master = 0 if trained_dtype(setting) == "float32" else 4\n    total',
           "master = 0\n    total", _BYTES + "test_bytes_of_real_optimizer_state"),
    Mutant("T44", "the plan keeps small tensors in 8 bits", _MEMORY, 'setting.state == "float32" or count < SMALLEST_INT8',
           'setting.state == "float32"', _BYTES + "test_bytes_of_real_optimizer_state"),
    Mutant("T36", "the plan keeps gate and up although they are computed again", "halfbyte/plan/activations.py",
           'Policy("recompute_mlp", ("input", "attention", "stream", *EXTRA)',
           'Policy("recompute_mlp", ("input", "attention", "stream", "inner", *EXTRA)',
           _KEPT + "test_own_layers_keep_what_the_table_says"),
    Mutant("T31", "the plan forgets what dropout keeps", "halfbyte/plan/activations.py", '"dropout": setting.dropout > 0,',
           '"dropout": False,', _KEPT + "test_layers_called_as_modules_keep_their_inputs"),
    Mutant("T29", "the plan gives every module the same rank", "halfbyte/plan/setting.py",
           "return setting.rank if found is None else ranks[found]", "return setting.rank", _BYTES + "test_bytes_of_a_real_model"),
    Mutant("T0", "a setting fits without the margin of error", "halfbyte/plan/search.py",
           "memory.total * (1 + hardware.margin) <= hardware.memory_bytes", "memory.total <= hardware.memory_bytes",
           _FITS + "test_fits_keeps_the_margin_and_tight_is_within_it"),
    Mutant("T0", "the moments of a step are added up", _MEMORY, "return sum(term.bytes for term in self.at(self.peak))",
           'return sum(term.bytes for term in self.terms if term.when != "host")', _BYTES + "test_the_total_is_the_largest_moment"),
]  # fmt: skip
