"""Bugs put into the decoding of a token on purpose."""

from tests.mutants.mutant import Mutant

_STEP, _ROWS = "halfbyte/models/decode_step.py", "halfbyte/models/rows.py"
_MODEL, _OPS = "tests/models/test_models_decoding.py::", "tests/kernels/test_kernels_decoding.py::"
_ATTENTION, _GEMV, _PACKED = (f"halfbyte/kernels/{name}/cpu.py" for name in ("cached_attention", "gemv", "matmul_4bit"))

MUTANTS = [
    Mutant(
        "T40", "the angles of an earlier token are used again", _STEP,
        '            self.turned.point("cos", cos)\n', "",
        _MODEL + "test_in_bfloat16_a_step_is_transformers_step[llama-False]",
    ),
    Mutant(
        "T26", "a window longer than the cache is cut one token short", _ROWS,
        "keys, values = keys[:, :, -plan.window :], values[:, :, -plan.window :]",
        "keys, values = keys[:, :, 1 - plan.window :], values[:, :, 1 - plan.window :]",
        _MODEL + "test_in_float32_a_step_is_transformers_step[mistral-window-1]",
    ),
    Mutant(
        "T67", "the adapter of the first step is used for good", _STEP,
        "    row, result = x[None], y[None]\n\n    def update() -> None:\n        lora_a, lora_b = module.factors()\n",
        "    row, result = x[None], y[None]\n    lora_a, lora_b = (factor.clone() for factor in module.factors())\n\n"
        "    def update() -> None:\n",
        _MODEL + "test_what_changes_between_two_steps_is_seen",
    ),
    Mutant(
        "T54", "a list goes on reading where a weight was before it moved", _STEP,
        "self.part and _addresses(self.part) == self.addresses", "self.part",
        _MODEL + "test_what_changes_between_two_steps_is_seen",
    ),
    Mutant(
        "T67", "an adapter that was taken out goes on acting", _STEP,
        "return self.parent._modules.get(self.name) is self.part and ", "return ",
        _MODEL + "test_an_exchanged_part_makes_another_list",
    ),
    Mutant(
        "T67", "two threads write into one list", _STEP,
        "return known if known is not None and known.lock.acquire(blocking=False) else None",
        "return known if known is not None and (known.lock.acquire(blocking=False) or True) else None",
        _MODEL + "test_two_threads_decode_the_same_model",
    ),
    Mutant(
        "T26", "a step with padding is taken for one without", _ROWS,
        "if mask is not None and (mask.ndim != 2 or not bool(mask.all())):", "if mask is not None and mask.ndim != 2:",
        _MODEL + "test_copies_and_masks",
    ),
    Mutant(
        "T50", "a NaN is taken for the smallest exponential", "halfbyte/kernels/scalars.py",
        "held = _LOWEST if x < _LOWEST else x", "held = x if x > _LOWEST else _LOWEST",
        _OPS + "test_nan_reaches_the_result",
    ),
    Mutant(
        "T51", "keys are read as if they lay one behind the other", _ATTENTION,
        "q, k, v = q.contiguous(), k.contiguous(), v.contiguous()",
        "q, k, v = q.contiguous(), *(part.transpose(1, 2).contiguous().view(part.shape) for part in (k, v))",
        _OPS + "test_cached_attention",
    ),
    Mutant(
        "T57", "the rest of a row beyond a multiple of 128 is left out", _GEMV,
        "            while i < columns:\n                a = pair_products(a,",
        "            while i < 0:\n                a = pair_products(a,",
        _OPS + "test_gemv",
    ),
    Mutant(
        "T54", "weights behind one input share the order that the first one asked for", _PACKED,
        "        if kind not in self._ordered:\n",
        "        kind = next(iter(self._ordered), kind)\n        if kind not in self._ordered:\n",
        _OPS + "test_several_weights_are_the_products_one_by_one",
    ),
]
