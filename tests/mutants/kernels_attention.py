"""Bugs put into packed attention on purpose."""

from tests.mutants.mutant import Mutant

_FOLDER = "halfbyte/kernels/packed_attention/"
_TEST = "tests/kernels/test_kernels_packed_attention.py::"
_ALL = _TEST + "test_forward_and_gradients_equal_the_float64_reference"

MUTANTS = [
    Mutant(
        "T19", "keys begin at the row, not at the segment", _FOLDER + "forward.py",
        "key = max(begin, q0 - window + 1) if window > 0 else begin",
        "key = max(begin, q0 - window + 1) if window > 0 else np.int64(0) * begin", _TEST + "test_a_segment_depends_on_itself_alone",
    ),
    Mutant(
        "T19", "a query sees the key after it", _FOLDER + "tiles.py", "min(keys, token + 1 - key)", "min(keys, token + 2 - key)", _ALL,
    ),
    Mutant(
        "T19", "the window is one too wide", _FOLDER + "tiles.py", "max(0, token - window + 1 - key)", "max(0, token - window - key)", _ALL,
    ),
    Mutant(
        "T19", "scores left over from an earlier block are summed", _FOLDER + "tiles.py",
        "        clear(room, place + skipped + vectors * WIDTH, place + padded)\n", "", _ALL,
    ),
    Mutant(
        "T27", "sums of earlier keys are not scaled to the new maximum", _FOLDER + "tiles.py", "room[c] *= less",
        "room[c] *= np.float32(1)", _ALL,
    ),
    Mutant(
        "T27", "the slope of the soft cap is left out of attention", _FOLDER + "tiles.py", "inverse_cap = np.float32(1) / softcap",
        "inverse_cap = np.float32(0) * softcap", _ALL,
    ),
    Mutant(
        "T42", "a row of NaN becomes a row of zeros", _FOLDER + "forward.py",
        "store(o, target + c, scratch[at_o + line * wide + c] * inverse)",
        "store(o, target + c, scratch[at_o + line * wide + c] * inverse if total > 0 else np.float32(0))",
        _TEST + "test_nan_comes_through",
    ),
    Mutant(
        "T51", "queries are read as if their rows lay side by side", _FOLDER + "forward.py",
        "block_of(q, q0 * q_apart + (head0 + h) * dim, q_apart,", "block_of(q, q0 * heads * dim + (head0 + h) * dim, heads * dim,",
        _TEST + "test_slices_of_a_fused_projection_are_read_in_place",
    ),
]  # fmt: skip
