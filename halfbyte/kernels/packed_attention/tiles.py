"""The steps of both kernels on `ROWS` rows of scores: what they see, products with a block of keys, softmax, gradients of the scores.

Everything lies in one float32 buffer, `room`, at offsets; a block of scores, queries or gradients has rows of `SCORES` numbers, keys and
values rows of `wide`.  Columns that a row does not see are set to 0 wherever a product reads them.

Importing this imports numba: only functions marked native(lazy=True) may, when called.
"""

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from halfbyte.kernels.packed_attention.layout import COLUMNS, QUERIES, ROWS, SCORES, WIDTH
from halfbyte.kernels.packed_attention.vectors import (
    multiply_columns,
    multiply_rows,
    row_cap,
    row_dot,
    row_exp,
    row_grad,
    row_max,
    transpose,
)

_NONE = np.float32(-np.inf)
step: Any = register_jitable(error_model="numpy")  # a division by zero gives infinity or NaN; nothing raises in a kernel


@step
def seen(token, key, keys, window):  # type: ignore[no-untyped-def]
    """[left, right) of the `keys` keys from `key` on that `token` sees; empty where right <= left."""
    return max(0, token - window + 1 - key) if window > 0 else 0, min(keys, token + 1 - key)


@step
def transposed(room, source, rows, dim, wide, target):  # type: ignore[no-untyped-def]
    """[row // COLUMNS][dim][COLUMNS] of rows of `wide`: so a product reads `COLUMNS` keys at once."""
    for row in range(0, rows, WIDTH):
        panel = target + row // COLUMNS * wide * COLUMNS + row % COLUMNS
        for d in range(0, dim, WIDTH):
            transpose(room, source + row * wide + d, wide, panel + d * COLUMNS, COLUMNS)


@step
def scores_of(room, rows, keys, dim, wide, low, high, target):  # type: ignore[no-untyped-def]
    """Rows times transposed keys, for the register blocks that hold columns low <= c < high."""
    for panel in range(low // COLUMNS, (high + COLUMNS - 1) // COLUMNS):
        for d in range(0, dim, SCORES):
            column = keys + (panel * wide + d) * COLUMNS
            multiply_rows(room, rows + d * QUERIES, 1, column, COLUMNS, target + panel * COLUMNS, SCORES, min(SCORES, dim - d), d)


@step
def add_rows(room, scores, low, high, keys, wide, target, keep):  # type: ignore[no-untyped-def]
    """target (+)= scores[:, low:high] times keys[low:high], both as they lie."""
    for panel in range(0, wide, COLUMNS):
        multiply_rows(room, scores + low, 1, keys + low * wide + panel, wide, target + panel, wide, high - low, keep)


@step
def add_columns(room, scores, low, high, rows, wide, target):  # type: ignore[no-untyped-def]
    """target += scores[low:high].T times rows[low:high], for `ROWS` columns of scores."""
    for panel in range(0, wide, COLUMNS):
        source = rows + (panel // SCORES * QUERIES + low) * SCORES + panel % SCORES
        multiply_columns(room, scores + low * SCORES, SCORES, source, SCORES, target + panel, wide, high - low, 1)


@step
def clear(room, begin, end):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        room[i] = np.float32(0)


@step
def softmax_row(room, row, left, right, low, high, softcap, top, total, sums, wide, keep):  # type: ignore[no-untyped-def]
    """One row of scores to exp(s - maximum so far); brings its maximum, its total and its sums up to date."""
    if right <= left:
        clear(room, row + low, row + high)
        return
    skipped = left // WIDTH * WIDTH
    vectors = (right - skipped + WIDTH - 1) // WIDTH
    if softcap > 0:
        row_cap(room, row + skipped, vectors, softcap)
    before = room[top]
    largest = max(before, row_max(room, row + skipped, vectors, left - skipped, right - skipped))
    shift = largest if largest > _NONE else np.float32(0)
    added = row_exp(room, row + skipped, vectors, left - skipped, right - skipped, shift)
    clear(room, row + low, row + skipped)
    clear(room, row + skipped + vectors * WIDTH, row + high)
    if keep:
        less = np.float32(math.exp(before - shift))
        added += room[total] * less
        if less != 1:
            for c in range(sums, sums + wide):
                room[c] *= less
    room[top], room[total] = largest, added


@step
def gradient_row(room, row, slopes, left, right, padded, softcap, lse, delta):  # type: ignore[no-untyped-def]
    """One row of scores to probabilities, one of do v^T to ds; 0 in all that is not seen of `padded` columns."""
    if right <= left:
        left, right = 0, 0
    skipped = left // WIDTH * WIDTH
    vectors = (right - skipped + WIDTH - 1) // WIDTH
    inverse_cap = np.float32(0)
    if softcap > 0:
        inverse_cap = np.float32(1) / softcap
        row_cap(room, row + skipped, vectors, softcap)
    row_grad(room, row + skipped, slopes + skipped, vectors, left - skipped, right - skipped, lse, delta, inverse_cap)
    for place in (row, slopes):
        clear(room, place, place + skipped)
        clear(room, place + skipped + vectors * WIDTH, place + padded)


@step
def delta_of(room, upstream, output, dim):  # type: ignore[no-untyped-def]
    """do . o of one row."""
    delta = np.float32(0)
    for d in range(0, dim, SCORES):
        width = min(SCORES, dim - d)
        here, there = upstream + d * QUERIES, output + d
        delta += row_dot(room, here, there, width // WIDTH)
        for c in range(width // WIDTH * WIDTH, width):
            delta += room[here + c] * room[there + c]
    return delta


@step
def rows_that_see(first_key, q0, rows, window):  # type: ignore[no-untyped-def]
    """[low, high) of the rows from token `q0` on that see one of `ROWS` keys: none before the first, none `window` after the last."""
    return max(0, first_key - q0), min(rows, first_key + ROWS - 1 + window - q0) if window > 0 else rows


@step
def gradients_of_rows(  # type: ignore[no-untyped-def]
    room, queries, upstream, keys_across, values_across, scores, slopes, delta, lse, lse_at, q0, start, end, key, keys, dim, wide, window,
    softcap,
):  # fmt: skip
    """Scores to probabilities and slopes to ds for rows start..end of a block; returns the columns [low, high) that any of them sees."""
    low, high = seen(q0 + start, key, keys, window)[0], seen(q0 + end - 1, key, keys, window)[1]
    padded = (keys + COLUMNS - 1) // COLUMNS * COLUMNS
    scores_of(room, queries + start * SCORES, keys_across, dim, wide, low, high, scores + start * SCORES)
    scores_of(room, upstream + start * SCORES, values_across, dim, wide, low, high, slopes + start * SCORES)
    for row in range(start, end):
        left, right = seen(q0 + row, key, keys, window)
        line = row * SCORES
        gradient_row(room, scores + line, slopes + line, left, right, padded, softcap, lse[lse_at + row], room[delta + row])
    return low, high
