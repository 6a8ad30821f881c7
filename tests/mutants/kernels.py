"""Bugs put into the kernels on purpose."""

from tests.mutants.mutant import Mutant

_WRITE = "halfbyte/kernels/quantize_blockwise/"
_READ = "halfbyte/kernels/dequantize_blockwise/"
_LOSS = "halfbyte/kernels/linear_cross_entropy/reference.py"
_BLOCKWISE = "tests/kernels/test_kernels_blockwise.py::"
_CROSS_ENTROPY = "tests/kernels/test_kernels_linear_cross_entropy.py::"
_BYTES = "tests/quant/test_quant_bitsandbytes.py::test_packed_bytes_and_absmax_equal"

MUTANTS = [
    Mutant(
        "T27", "the upstream gradient is ignored", _LOSS, "(d_hidden * scalar).to(d_hidden.dtype)", "d_hidden",
        _CROSS_ENTROPY + "test_non_uniform_upstream_gradient",
    ),
    Mutant(
        "T27", "p - 1 of the true class is formed after rounding", _LOSS,
        "        z.scatter_add_(1, labels[:, None], z.new_full((len(labels), 1), -1.0))",
        "        z.copy_(z.bfloat16()).scatter_add_(1, labels[:, None], z.new_full((len(labels), 1), -1.0))",
        _CROSS_ENTROPY + "test_true_class_gradient_is_formed_in_float32",
    ),
    Mutant(
        "T27", "the slope of the soft cap is left out", _LOSS, "            z *= slope", "            z *= 1.0",
        _CROSS_ENTROPY + "test_gradients_in_float64",
    ),
    Mutant(
        "T47", "the last block's scale looks at a whole block", _WRITE + "cpu.py",
        "        top = _scale_block(x[start : start + size], mask, value_of, blocksize, scaled)",
        "        top = _scale_block(x[max(0, x.size - blocksize) if size < blocksize else start : start + size], mask, value_of,"
        " blocksize, scaled)",
        _BYTES,
    ),
    Mutant(
        "T47", "the last element of a block is not read back", _READ + "cpu.py", "        size = min(blocksize, numel - start)",
        "        size = max(1, min(blocksize, numel - start) - 1)", _BLOCKWISE + "test_every_size_stays_inside_its_buffers",
    ),
    Mutant(
        "T47", "the odd last element is left out", _READ + "cpu.py", "        if size % 2:", "        if size % 2 and size > 64:",
        _BLOCKWISE + "test_cpu_dequantize_equals_reference",
    ),
    Mutant(
        "T48", "a byte keeps bits of the one before it", _WRITE + "cpu.py",
        "        packed[k] = pairs[np.int64(ranks[2 * k]) * 16 + ranks[2 * k + 1]]",
        "        packed[k] = pairs[np.int64(ranks[2 * k]) * 16 + ranks[2 * k + 1]] | (packed[k - 1] & 1 if k else 0)",
        _BLOCKWISE + "test_codes_equal_numpy_oracle",
    ),
    Mutant(
        "T48", "low nibble first", _WRITE + "reference.py", "return (indices[::2] << 4) | indices[1::2], absmax_N",
        "return (indices[1::2] << 4) | indices[::2], absmax_N", _BLOCKWISE + "test_cpu_quantize_equals_reference",
    ),
    Mutant(
        "T49", "a block of zeros is divided by its scale (reference)", _WRITE + "reference.py", "1.0 / absmax_N.clamp(min=SMALLEST)",
        "1.0 / absmax_N", _BLOCKWISE + "test_zero_and_denormal_blocks",
    ),
    Mutant(
        "T49", "a block of zeros is divided by its scale (CPU)", _WRITE + "cpu.py",
        "        _times(x, np.float32(1) / max(top, _SMALLEST), value_of, scaled)",
        "        _times(x, np.float32(1) / top if top > 0 else np.float32(np.nan), value_of, scaled)",
        _BLOCKWISE + "test_zero_and_denormal_blocks",
    ),
    Mutant(
        "T52", "quantize counts elements in 32 bits", _WRITE + "cpu.py",
        "        start = block * blocksize\n        size = min(blocksize, x.size - start)\n        even",
        "        start = np.int64(np.int32(block * blocksize))\n        size = min(blocksize, x.size - start)\n        even",
        _BLOCKWISE + "test_offsets_beyond_two_to_the_31",
    ),
    Mutant(
        "T52", "dequantize counts elements in 32 bits", _READ + "cpu.py",
        "        start = block * blocksize\n        size = min(blocksize, numel - start)",
        "        start = np.int64(np.int32(block * blocksize))\n        size = min(blocksize, numel - start)",
        _BLOCKWISE + "test_offsets_beyond_two_to_the_31",
    ),
    Mutant(
        "T57", "bfloat16 is cut off instead of rounded", "halfbyte/kernels/bfloat16_bits.py", "(np.uint64(bits) + np.uint32(0x7FFF)",
        "(np.uint64(bits) + np.uint32(0)", _BLOCKWISE + "test_cpu_dequantize_equals_reference",
    ),
    Mutant(
        "T57", "the vector path rounds halves up", _READ + "avx512.py",
        "builder.add(builder.add(bits, _constant(_I32, 0x7FFF, 16)), odd)", "builder.add(bits, _constant(_I32, 0x8000, 16))",
        _BLOCKWISE + "test_halves_round_to_even_on_every_path",
    ),
    Mutant(
        "T57", "the reference rounds the scale before it multiplies", _READ + "reference.py",
        "(levels * absmax.reshape(-1).repeat_interleave(blocksize)[:numel]).to(dtype)",
        "levels.to(dtype) * absmax.reshape(-1).repeat_interleave(blocksize)[:numel].to(dtype)",
        _BLOCKWISE + "test_dequantize_equals_look_up_in_numpy",
    ),
]  # fmt: skip
