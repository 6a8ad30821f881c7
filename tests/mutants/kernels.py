"""Bugs put into the kernels on purpose."""

from tests.mutants.mutant import Mutant

_WRITE = "halfbyte/kernels/quantize_blockwise/"
_READ = "halfbyte/kernels/dequantize_blockwise/"
_LOSS = "halfbyte/kernels/linear_cross_entropy/"
_NORM = "halfbyte/kernels/rms_norm/"
_ROPE = "halfbyte/kernels/rope/"
_GATED = "halfbyte/kernels/gated_mlp/"
_BLOCKWISE = "tests/kernels/test_kernels_blockwise.py::"
_CROSS_ENTROPY = "tests/kernels/test_kernels_linear_cross_entropy.py::"
_BYTES = "tests/quant/test_quant_bitsandbytes.py::test_packed_bytes_and_absmax_equal"

_NATIVE = "halfbyte/kernels/native.py"
_OBJECT_CODE = "halfbyte/kernels/object_code.py"
_OF_NATIVE = "tests/kernels/test_kernels_native.py::"

MUTANTS = [
    Mutant(
        "T0", "object code is used without its checksum", _OBJECT_CODE,
        "return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None", "return content[32:]",
        _OF_NATIVE + "test_a_second_process_compiles_nothing_and_a_changed_file_is_made_again",
    ),
    Mutant(
        "T0", "object code of a folder others can write to is used", _OBJECT_CODE, "or seen.st_mode & 0o022", "or seen.st_mode & 0",
        _OF_NATIVE + "test_a_folder_others_can_write_to_is_not_used",
    ),
    Mutant(
        "T0", "strides are not looked at before a pointer is taken", _NATIVE, "or not value.is_contiguous()", "",
        _OF_NATIVE + "test_what_a_kernel_cannot_read_is_refused",
    ),
    Mutant(
        "T27", "the upstream gradient is ignored", _LOSS + "chunks.py", "(d_hidden * scalar).to(d_hidden.dtype)", "d_hidden",
        _CROSS_ENTROPY + "test_non_uniform_upstream_gradient",
    ),
    Mutant(
        "T27", "p - 1 of the true class is formed after rounding", _LOSS + "cpu.py",
        "store(z, at + labels[row], (exp(value - top) * share - _ONE) * (_ONE - bend * bend) * scale)",
        "store(z, at + labels[row], load(z, at + labels[row]) - scale)", _CROSS_ENTROPY + "test_true_class_gradient_is_formed_in_float32",
    ),
    Mutant(
        "T27", "the slope of the soft cap is left out (reference)", _LOSS + "reference.py", "            wide *= slope",
        "            wide *= 1.0", _CROSS_ENTROPY + "test_gradients_in_float64",
    ),
    Mutant(
        "T27", "the slope of the soft cap is left out (CPU)", _LOSS + "cpu.py", " * (_ONE - t * t) * factor", " * factor",
        _CROSS_ENTROPY + "test_logits_become_their_gradient",
    ),
    Mutant(
        "T27", "a sum is not carried over to a new maximum", _LOSS + "cpu.py", "                total *= exp(top - seen)",
        "                total *= _ONE", _CROSS_ENTROPY + "test_extreme_logits",
    ),
    Mutant(
        "T27", "the rows of the gradient are not put back where they belong", _LOSS + "chunks.py", ".index_copy_(0, rows, d_x)",
        ".index_copy_(0, torch.arange(len(rows)), d_x)", _CROSS_ENTROPY + "test_gradients_in_float64",
    ),
    Mutant(
        "T42", "a row's maximum drops NaN and the sum starts over", _LOSS + "cpu.py", "            total += part",
        "            total += part if part > 0 else np.float32(0)", _CROSS_ENTROPY + "test_what_is_no_number_shows_in_the_loss",
    ),
    Mutant(
        "T42", "the bits of a NaN are rounded up", "halfbyte/kernels/scalars.py",
        "    return rounded if wide == wide else np.uint16(0x7FC0)", "    return rounded",
        "tests/kernels/test_kernels_nan.py::test_every_nan_stays_nan",
    ),
    Mutant(
        "T57", "the normalised row is not rounded before the weight", _NORM + "cpu.py",
        "widen(narrow(load(summed, at + i) * r)) * w[i]", "load(summed, at + i) * r * w[i]",
        "tests/kernels/test_kernels_rms_norm.py::test_the_forms_are_those_of_transformers",
    ),
    Mutant(
        "T57", "the norm is taken of the sum before it is rounded", _NORM + "cpu.py", "            value = load(summed, at + i)",
        "            value = load(x, at + i) + load(residual, at + i)",
        "tests/kernels/test_kernels_rms_norm.py::test_the_norm_is_of_the_rounded_sum",
    ),
    Mutant(
        "T27", "the second gradient of a sum and its norm is lost", _NORM + "__init__.py", "rstd, ctx.form, d_summed)", "rstd, ctx.form)",
        "tests/kernels/test_kernels_rms_norm.py::test_gradients_in_float64",
    ),
    Mutant(
        "T40", "the gradient of a rotation turns the same way", _ROPE + "__init__.py", "not ctx.inverse", "ctx.inverse",
        "tests/kernels/test_kernels_rope.py::test_gradients_in_float64",
    ),
    Mutant(
        "T40", "neighbouring columns are paired (in place)", _ROPE + "cpu.py",
        "            a = token * token_step + head * head_step\n            b = a + half\n            if inverse:",
        "            a = token * token_step + head * head_step\n            b = a + 1\n            if inverse:",
        "tests/kernels/test_kernels_rope.py::test_equals_the_float64_reference",
    ),
    Mutant(
        "T51", "a slice of a fused projection is read as if it were alone", _ROPE + "cpu.py",
        "cos.shape[1], x.stride(0), x.stride(1), inverse, work=y", "cos.shape[1], heads * width, width, inverse, work=y",
        "tests/kernels/test_kernels_rope.py::test_slices_of_a_fused_projection",
    ),
    Mutant(
        "T51", "rows of a slice are read as if they lay side by side", "halfbyte/kernels/rows.py", "width,), (1,)), stride",
        "width,), (1,)), width", "tests/kernels/test_kernels_gated_mlp.py::test_halves_of_one_projection_and_turned_tensors",
    ),
    Mutant(
        "T27", "the slope of gelu's tangent is that of silu", _GATED + "cpu.py", " * (_TWICE * (_ONE + _THREE_CUBES * g * g))", "",
        "tests/kernels/test_kernels_gated_mlp.py::test_equals_pytorch_in_float64",
    ),
    Mutant(
        "T47", "the last block's scale looks at a whole block", _WRITE + "cpu.py",
        "            scale = top_of(x, start, size)\n            divisor",
        "            scale = top_of(x, max(0, numel - blocksize), min(blocksize, numel))\n            divisor", _BYTES,
    ),
    Mutant(
        "T47", "the last element of a block is not read back", _READ + "cpu.py", "            for i in range(32 * whole, size):",
        "            for i in range(32 * whole, max(1, size - 1)):", _BLOCKWISE + "test_every_size_stays_inside_its_buffers",
    ),
    Mutant(
        "T47", "the odd last element takes the low half of its byte", _READ + "cpu.py", "(4 - 4 * (i & 1))", "(4 * (i & 1))",
        _BLOCKWISE + "test_cpu_dequantize_equals_reference",
    ),
    Mutant(
        "T48", "a byte keeps bits of the one before it", _WRITE + "cpu.py",
        "                packed[(start + i) >> 1] = byte",
        "                packed[(start + i) >> 1] = byte | (packed[((start + i) >> 1) - 1] & 1 if i else 0)",
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
        "                factor = splat(_ONE / max(scale, _SMALLEST))", "                factor = splat(_ONE / scale)",
        _BLOCKWISE + "test_zero_and_denormal_blocks",
    ),
    Mutant(
        "T52", "quantize counts elements in 32 bits", _WRITE + "cpu.py",
        "            start = block * blocksize\n            size = min(blocksize, numel - start)\n            if",
        "            start = np.int64(np.int32(block * blocksize))\n            size = min(blocksize, numel - start)\n            if",
        _BLOCKWISE + "test_offsets_beyond_two_to_the_31",
    ),
    Mutant(
        "T52", "dequantize counts elements in 32 bits", _READ + "cpu.py",
        "            start = block * blocksize\n            size = min(blocksize, numel - start)\n            to",
        "            start = np.int64(np.int32(block * blocksize))\n            size = min(blocksize, numel - start)\n            to",
        _BLOCKWISE + "test_offsets_beyond_two_to_the_31",
    ),
    Mutant(
        "T57", "bfloat16 is cut off instead of rounded", "halfbyte/kernels/scalars.py", "(bits + (np.uint32(0x7FFF)",
        "(bits + (np.uint32(0)", _BLOCKWISE + "test_bfloat16_rounds_to_nearest_even",
    ),
    Mutant(
        "T57", "the vector path rounds halves up", "halfbyte/kernels/vectors.py",
        "builder.add(builder.add(bits, _constant(_I32, 0x7FFF)), odd)", "builder.add(bits, _constant(_I32, 0x8000))",
        _BLOCKWISE + "test_halves_round_to_even_on_every_path",
    ),
    Mutant(
        "T57", "AVX2 takes the low half of the table only", "halfbyte/kernels/vectors.py",
        "parts.append(builder.select(_bit(builder, part, 8), b, a))", "parts.append(a)",
        _BLOCKWISE + "test_other_instruction_sets_give_the_same_bits",
    ),
    Mutant(
        "T53", "nested scales lose the mean that was taken off", _READ + "cpu.py",
        "levels2[codes[block]] * absmax2[block >> 8] + offset[0]", "levels2[codes[block]] * absmax2[block >> 8]",
        _BLOCKWISE + "test_nested_scales_are_rounded_twice",
    ),
    Mutant(
        "T57", "the product with one row swaps even and odd elements", "halfbyte/kernels/matmul_4bit/cpu.py",
        "self.x.float().reshape(self.rows, columns // 32, 16, 2).transpose(2, 3)",
        "self.x.float().reshape(self.rows, columns // 32, 16, 2).flip(3).transpose(2, 3)",
        "tests/kernels/test_kernels_matmul_4bit.py::test_few_rows",
    ),
    Mutant(
        "T57", "the reference rounds the scale before it multiplies", _READ + "reference.py",
        "(levels * absmax.reshape(-1).repeat_interleave(blocksize)[:numel]).to(dtype)",
        "levels.to(dtype) * absmax.reshape(-1).repeat_interleave(blocksize)[:numel].to(dtype)",
        _BLOCKWISE + "test_dequantize_equals_look_up_in_numpy",
    ),
    Mutant(
        "T47", "the last element of a block of moments is not updated", "halfbyte/kernels/adamw/cpu.py",
        "size = min(BLOCKSIZE, numel - start)", "size = max(1, min(BLOCKSIZE, numel - start) - 1)",
        "tests/kernels/test_kernels_adamw.py::test_int8_state_has_the_bits_of_dequantize_update_quantize",
    ),
    Mutant(
        "T48", "a moment is stored as the first level of its range", "halfbyte/kernels/adamw/cpu.py", "    for _ in range(steps):\n",
        "    for _ in range(0):\n", "tests/kernels/test_kernels_adamw.py::test_int8_state_has_the_bits_of_dequantize_update_quantize",
    ),
    Mutant(
        "T38", "a small second moment is stored as zero", "halfbyte/kernels/adamw/cpu.py", " + np.uint8((index == 0) & (two > _ZERO))", "",
        "tests/kernels/test_kernels_adamw.py::test_int8_second_moment_above_zero_is_never_stored_as_zero",
    ),
    Mutant(
        "T43", "decay is not decoupled from the gradient's part", "halfbyte/kernels/adamw/cpu.py",
        "        m[i], v[i] = one, two\n        p[i] = p[i] * decay", "        m[i], v[i] = one, two\n        p[i] = p[i]",
        "tests/kernels/test_kernels_adamw.py::test_float32_moments_follow_the_float64_reference",
    ),
]  # fmt: skip
