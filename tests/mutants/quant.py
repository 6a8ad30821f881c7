"""Bugs put into the low-bit weights and their files on purpose."""

from tests.mutants.mutant import Mutant

_BLOCKWISE = "halfbyte/quant/blockwise.py"
_TEST_BLOCKWISE = "tests/quant/test_quant_blockwise.py::"
_LINEAR = "halfbyte/quant/linear.py"
_TEST_LINEAR = "tests/quant/test_quant_linear.py::"
_FILE = "halfbyte/formats/bnb4bit.py"
_TEST_FILE = "tests/formats/test_formats_bnb4bit.py::"

MUTANTS = [
    Mutant(
        "T39", "activations are cast to the dtype of the packed weight", _LINEAR, "            x = x.to(self.compute_dtype)",
        "            x = x.to(self.weight.dtype)", _TEST_LINEAR + "test_compute_dtype_is_a_field",
    ),
    Mutant(
        "T39", "the result takes the dtype of the stored weight", _LINEAR, "        return self._product(x).to(arrived)",
        "        return self._product(x).to(self.dtype)", _TEST_LINEAR + "test_forward_dtypes",
    ),
    Mutant(
        "T50", "weights that are not finite are taken", _BLOCKWISE, "    if _all_finite(absmax):",
        "    if absmax.numel():", _TEST_BLOCKWISE + "test_non_finite_weights_are_refused",
    ),
    Mutant(
        "T50", "the largest element is found by comparing floats, where NaN hides", "halfbyte/kernels/vectors.py",
        '        return builder.select(builder.icmp_signed(">", x, y), x, y)',
        '        return builder.select(builder.fcmp_ordered(">", builder.bitcast(x, _FLOATS), builder.bitcast(y, _FLOATS)), x, y)',
        _TEST_BLOCKWISE + "test_non_finite_weights_are_refused",
    ),
    Mutant(
        "T51", "a view is quantized in the order of its memory", _BLOCKWISE, "    flat = weight.contiguous().reshape(-1)",
        "    room = weight.untyped_storage().nbytes() >= weight.nbytes\n"
        "    flat = weight.as_strided((weight.numel(),), (1,)) if room else weight.reshape(-1)",
        _TEST_BLOCKWISE + "test_memory_layout_does_not_matter",
    ),
    Mutant(
        "T53", "the mean of the scales is rounded to bfloat16", _BLOCKWISE, "    offset = absmax.mean()",
        "    offset = absmax.mean().bfloat16().float()", "tests/quant/test_quant_bitsandbytes.py::test_double_quantization_equals",
    ),
    Mutant(
        "T53", "the mean of the scales is not added back", _BLOCKWISE, "    return scales + nested.offset", "    return scales",
        "tests/quant/test_quant_bitsandbytes.py::test_dequantize_equals",
    ),
    Mutant(
        "T53", "the offset of a file is read in half precision", _FILE,
        "torch.tensor(about.offset, dtype=torch.float32, device=packed.device)",
        "torch.tensor(about.offset, dtype=torch.float16, device=packed.device).float()",
        _TEST_FILE + "test_we_load_what_bitsandbytes_writes",
    ),
    Mutant(
        "T54", "casting the model casts the scales", _LINEAR,
        "        return tensor.to(moved.device) if id(tensor) in held and moved.dtype != tensor.dtype else moved",
        "        return moved", _TEST_LINEAR + "test_every_move_keeps_every_bit",
    ),
    Mutant(
        "T54", "the second-level scales are not saved", _LINEAR,
        '        self.register_buffer("absmax2", state.nested.absmax2 if state.nested else None)',
        '        self.register_buffer("absmax2", state.nested.absmax2 if state.nested else None, persistent=False)',
        _TEST_LINEAR + "test_every_move_keeps_every_bit",
    ),
    Mutant(
        "T54", "the codebook is left behind by moves", _LINEAR,
        '        self.register_buffer("codebook", state.codebook if state.format != "int8" else None)',
        '        self.codebook = state.codebook if state.format != "int8" else None',
        _TEST_LINEAR + "test_every_move_keeps_every_bit",
    ),
    Mutant(
        "T54", "casting the model casts the scales of experts", "halfbyte/quant/experts.py",
        "        return super()._apply(keep_dtypes(self, self._held, fn), recurse)", "        return super()._apply(fn, recurse)",
        "tests/quant/test_quant_experts.py::test_moves_keep_every_bit",
    ),
    Mutant(
        "T55", "bytes stored under a float dtype are cast", _FILE, "packed = tensors[name].contiguous().view(torch.uint8).reshape(-1)",
        "packed = tensors[name].to(torch.uint8).reshape(-1)", _TEST_FILE + "test_bytes_stored_as_floats_are_read_as_bytes",
    ),
    Mutant(
        "T55", "packed bytes pass through a cast", _LINEAR,
        'STATE_BUFFERS = ("weight", "absmax", "codebook", "absmax2", "nested_codebook", "offset")',
        'STATE_BUFFERS = ("absmax", "codebook", "absmax2", "nested_codebook", "offset")', _TEST_LINEAR + "test_names_of_the_buffers",
    ),
    Mutant(
        "T56", "a layer whose owner reads the raw weight counts as linear", "halfbyte/quant/dense.py",
        "isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)", "isinstance(module, nn.Linear)",
        _TEST_LINEAR + "test_which_layers_are_linear",
    ),
    Mutant(
        "T56", "a layer with its own forward counts as linear", "halfbyte/quant/dense.py",
        "type(module).forward is nn.Linear.forward", "callable(type(module).forward)", _TEST_LINEAR + "test_which_layers_are_linear",
    ),
]  # fmt: skip
