"""Bugs put into the Triton kernels on purpose."""

from tests.mutants.mutant import Mutant

_KERNELS = "halfbyte/kernels/"
_READ, _WRITE = _KERNELS + "dequantize_blockwise/triton_gpu.py", _KERNELS + "quantize_blockwise/triton_gpu.py"
_NORM, _LOSS = _KERNELS + "rms_norm/triton_gpu.py", _KERNELS + "linear_cross_entropy/triton_gpu.py"
_STEP = _KERNELS + "adamw/triton_gpu.py"
_TURN, _GATE = _KERNELS + "rope/triton_gpu.py", _KERNELS + "gated_mlp/triton_gpu.py"


def _interpreted(name: str) -> str:
    return f"tests/kernels/test_kernels_triton.py::test_in_the_interpreter[{name}]"


def _compiled(name: str) -> str:
    return f"tests/kernels/test_kernels_triton.py::test_what_the_compiler_makes[{name}]"


_FAR_ROWS, _FAR_BLOCKS = _interpreted("test_rows_beyond_two_to_the_31"), _interpreted("test_blocks_beyond_two_to_the_31")

MUTANTS = [
    Mutant(
        "T27", "the slope of the soft cap is left out (Triton)", _LOSS, "(dz * slope).to(", "(dz * scale).to(",
        _interpreted("test_cross_entropy_in_place"),
    ),
    Mutant(
        "T27", "logits past the end of the vocabulary count as zeros (Triton)", _LOSS,
        '        value = tl.where(inside, value, float("-inf"))\n', "",
        _interpreted("test_cross_entropy_in_place"),
    ),
    Mutant(
        "T27", "p - 1 of the true class is formed after rounding (Triton)", _LOSS, "dz = tl.exp(value - m) / total -",
        "dz = (tl.exp(value - m) / total).to(z.dtype.element_ty).to(tl.float32) -",
        _interpreted("test_cross_entropy_of_sure_rows_and_extreme_logits"),
    ),
    Mutant(
        "T47", "the tail of the last block is written past the end (Triton)", _READ,
        "inside = (element < numel) & (column < BLOCKSIZE)[None, :]",
        "inside = (element < numel + 1) & (column < BLOCKSIZE)[None, :]", _interpreted("test_dequantize_writes_nothing_outside"),
    ),
    Mutant(
        "T47", "the columns above a block size that is no power of two are not masked (Triton)", _WRITE,
        "inside = (element < numel) & (column < BLOCKSIZE)[None, :]", "inside = (element < numel) & (column < WIDTH)[None, :]",
        _interpreted("test_quantize_gives_the_bits_of_the_reference"),
    ),
    Mutant(
        "T48", "quotients are approximated (Triton)", _WRITE, "over = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))",
        "over = x / divisor[:, None]", _compiled("test_quantize_divides_exactly"),
    ),
    Mutant(
        "T50", "a NaN hides from the maximum of its block (Triton)", _WRITE, "absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)",
        "absmax = tl.max(tl.abs(tl.where(x == x, x, 0.0)), axis=1)", _interpreted("test_quantize_zero_denormal_and_nan_blocks"),
    ),
    Mutant(
        "T52", "dequantize counts blocks in 32 bits (Triton)", _READ, "block = tl.program_id(0).to(tl.int64) * BLOCKS",
        "block = tl.program_id(0) * BLOCKS", _FAR_BLOCKS,
    ),
    Mutant(
        "T52", "quantize counts blocks in 32 bits (Triton)", _WRITE, "block = tl.program_id(0).to(tl.int64) * BLOCKS",
        "block = tl.program_id(0) * BLOCKS", _FAR_BLOCKS,
    ),
    Mutant(
        "T52", "the norm's gradient counts rows in 32 bits (Triton)", _NORM,
        "    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)\n    column = tl.arange(0, WIDTH)\n"
        "    inside = (row < rows)[:, None] & (column < columns)[None, :]\n    r = ",
        "    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)\n    column = tl.arange(0, WIDTH)\n"
        "    inside = (row < rows)[:, None] & (column < columns)[None, :]\n    r = ",
        _FAR_ROWS,
    ),
    Mutant(
        "T52", "rope counts tokens in 32 bits (Triton)", _TURN, "token = tl.program_id(0).to(tl.int64) // groups",
        "token = tl.program_id(0) // groups", _FAR_ROWS,
    ),
    Mutant(
        "T52", "the gated activation counts rows in 32 bits (Triton)", _GATE, "row = tl.program_id(0).to(tl.int64) // groups * ROWS",
        "row = tl.program_id(0) // groups * ROWS", _FAR_ROWS,
    ),
    Mutant(
        "T52", "cross-entropy counts rows in 32 bits (Triton)", _LOSS, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
        _FAR_ROWS,
    ),
    Mutant(
        "T53", "scale and offset are joined with one rounding (Triton)", _READ,
        "scale = level * tl.load(absmax2 + block // 256, mask=inside, other=0.0) + tl.load(offset)",
        "scale = (level.to(tl.float64) * tl.load(absmax2 + block // 256, mask=inside, other=0.0) + tl.load(offset)).to(tl.float32)",
        _interpreted("test_double_quantization_is_undone_with_two_roundings"),
    ),
    Mutant(
        "T53", "the compiler may fuse a product and a sum (Triton)", _READ, "exact=True, BLOCKSIZE", "exact=False, BLOCKSIZE",
        _compiled("test_dequantize_is_not_fused_and_moves_16_bytes"),
    ),
    Mutant(
        "T47", "AdamW writes past the end of its buffer (Triton)", _STEP, "    inside = at < count\n", "    inside = at < count + 1\n",
        _interpreted("test_adamw_steps_as_the_reference"),
    ),
    Mutant(
        "T52", "AdamW counts its numbers in 32 bits (Triton)", _STEP, "at = tl.program_id(0).to(tl.int64) * WIDTH",
        "at = tl.program_id(0) * WIDTH", _interpreted("test_optimizer_states_beyond_two_to_the_31"),
    ),
    Mutant(
        "T43", "weight decay is left out (Triton)", _STEP, "return p * keep -", "return p -",
        _interpreted("test_adamw_steps_as_the_reference"),
    ),
    Mutant(
        "T38", "a small second moment is stored as zero (Triton)", _STEP,
        "    index = tl.where((index == 0) & (new_v > 0), 1, index)", "    index = index",
        _interpreted("test_adamw_with_moments_in_8_bits"),
    ),
]  # fmt: skip
