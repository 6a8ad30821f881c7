"""Bugs put into the calibration of a 4-bit base on purpose."""

from tests.mutants.mutant import Mutant

_MOMENTS, _TEST_MOMENTS = "halfbyte/calibrate/moments.py", "tests/calibrate/test_calibrate_moments.py::"
_SEARCH, _TEST_SEARCH = "halfbyte/kernels/search_scales/", "tests/kernels/test_kernels_search_scales.py::"
_SCALES, _TEST_SCALES = "halfbyte/calibrate/scales.py", "tests/calibrate/test_calibrate_scales.py::"
_LOW_RANK, _TEST_LOW_RANK = "halfbyte/calibrate/low_rank.py", "tests/calibrate/test_calibrate_low_rank.py::"
_BASE, _TEST_BASE = "halfbyte/calibrate/base.py", "tests/calibrate/test_calibrate_base.py::"
_TEST_TRAIN = "tests/train/test_train_calibrated.py::"

MUTANTS = [
    Mutant(
        "T28", "the start is written without dividing by the scaling", _LOW_RANK,
        "right / balance[:, None] / scaling**0.5, left * balance / scaling**0.5", "right / balance[:, None], left * balance",
        _TEST_LOW_RANK + "test_the_product_is_the_best_of_its_rank",
    ),
    Mutant(
        "T28", "a start read under another alpha is not stretched", "halfbyte/models/calibrated_base.py",
        "        stretch = _scaling(adapter.config, name) / _scaling(config, name)", "        stretch = 1.0",
        _TEST_TRAIN + "test_a_folder_of_the_quantize_command_serves_a_run",
    ),
    Mutant(
        "T31", "dropout is left on while the moments are collected", _MOMENTS,
        "        stack.enter_context(evaluating(model))", "        pass",
        _TEST_MOMENTS + "test_sums_are_those_of_the_inputs",
    ),
    Mutant(
        "T47", "a shorter last block keeps the plain scale", _SEARCH + "cpu.py", "        scales[whole:] = reference.search_scales(",
        "        scales[whole:] = last.abs().max()\n        reference.search_scales(",
        _TEST_SEARCH + "test_the_kernel_is_as_good_as_the_reference",
    ),
    Mutant(
        "T47", "the reference searches a shorter last block without its last elements", _SEARCH + "reference.py",
        "        fill = -piece.numel() % blocksize", "        piece = piece[: max(1, piece.numel() // blocksize) * blocksize]\n"
        "        column, fill = column[: len(piece)], -piece.numel() % blocksize",
        _TEST_SEARCH + "test_the_kernel_is_as_good_as_the_reference",
    ),
    Mutant(
        "T49", "a scale of zero is divided by", "halfbyte/quant/blockwise.py", "    divisors = torch.where(scales == 0, 1.0, scales)",
        "    divisors = scales", _TEST_SCALES + "test_weights_that_are_zero_stay_zero",
    ),
    Mutant(
        "T50", "sums that are not finite are calibrated on", "halfbyte/calibrate/layer.py",
        "    if not (math.isfinite(energy) and bool(seen.fit.diagonal.isfinite().all())):", "    if energy < 0:",
        _TEST_BASE + "test_squares_that_are_no_numbers_are_refused",
    ),
    Mutant(
        "T50", "weights that are not finite are searched", _SCALES, "    blockwise.refuse_non_finite(weight_OI, name)\n", "",
        _TEST_SCALES + "test_weights_that_are_not_finite_are_refused",
    ),
    Mutant(
        "T51", "blocks take the importance of the first columns wherever they begin", _SEARCH + "cpu.py",
        "            column = start % columns", "            column = 0", _TEST_SCALES + "test_scales_are_the_best_of_the_grid",
    ),
    Mutant(
        "T51", "the reference takes the importance of the first columns for every piece", _SEARCH + "reference.py",
        "        column = torch.arange(start, start + piece.numel(), device=piece.device) % columns",
        "        column = torch.arange(piece.numel(), device=piece.device) % blocksize % columns",
        _TEST_SEARCH + "test_the_kernel_is_as_good_as_the_reference",
    ),
    Mutant(
        "T50", "a scale that overflowed is taken", _SEARCH + "cpu.py", "                if found < least:",
        "                if not found > least:", _TEST_SEARCH + "test_where_no_error_is_a_number_the_plain_scale_stays",
    ),
    Mutant(
        "T53", "codes are picked before the scales are quantized to 8 bits", "halfbyte/quant/blockwise.py",
        "    scales = plain_absmax(state)\n    divisors", "    scales = absmax\n    divisors",
        _TEST_SCALES + "test_codes_are_picked_for_the_scale_as_it_reads_back",
    ),
    Mutant(
        "T53", "the search is by the error of the weight alone", _SEARCH + "cpu.py",
        "fused(times(gap, gap), load16(importance, column + i), error)",
        "fused(gap, gap, error)", _TEST_SCALES + "test_scales_are_the_best_of_the_grid",
    ),
    Mutant(
        "T48", "the first 4 bits of a byte hold the second element", "halfbyte/quant/blockwise.py",
        "        packed.append((indices[::2] << 4) | indices[1::2])", "        packed.append((indices[1::2] << 4) | indices[::2])",
        _TEST_SCALES + "test_the_scale_of_the_plain_format_gives_the_plain_bytes",
    ),
    Mutant(
        "T53", "the written folder has the plain bytes", _BASE,
        "        stored, state, quality = made.packed, made.state, made.quality",
        "        (stored, state), quality = blockwise.quantize(weight, *options), made.quality",
        _TEST_BASE + "test_base_and_start_are_nearer_to_the_model",
    ),
    Mutant(
        "T70", "a resumed run makes its base anew", "halfbyte/train/calibrated_base.py",
        "    if resume:\n        return config, base_of_run",
        "    if resume and config.train.seed < 0:\n        return config, base_of_run",
        _TEST_TRAIN + "test_a_resumed_run_is_the_same_to_the_bit",
    ),
    Mutant(
        "T59", "an adapter of a calibrated base is opened on the model it came from", "halfbyte/evaluate/opened.py",
        "    return config.model.name if config.quant.calibrate is not True else str(base_of_run(run))", "    return config.model.name",
        _TEST_TRAIN + "test_merge_generate_and_a_moved_run_use_the_base",
    ),
    Mutant(
        "T0", "the mean with the start is over other layers than the one without", "halfbyte/calibrate/quality.py",
        "[_last(layer) for layer in self.layers if layer.output_error is not None]",
        "[_last(layer) for layer in self.layers if layer.output_error_with_start is not None]",
        _TEST_BASE + "test_means_are_over_the_same_layers",
    ),
    Mutant(
        "T0", "scales are judged on the rows they were fitted to", "halfbyte/calibrate/layer.py",
        "plain_error, error = seen.check.error(plain_gap) / energy, seen.check.error(gap) / energy",
        "plain_error, error = seen.fit.error(plain_gap) / energy, seen.fit.error(gap) / energy",
        _TEST_BASE + "test_scales_that_are_worse_on_the_checking_rows_are_not_kept",
    ),
]
