"""The forward kernel: one item is a block of queries of a few heads that share keys; softmax is kept as running maximum and sum.

    per block of keys:   s = q k^T,   m' = max(m, rowmax s),   p = exp(s - m'),   l = l e^(m - m') + rowsum p,   o = o e^(m - m') + p v
    at the end:          o / l,   lse = m + ln l

Keys are laid down column by column (`COLUMNS` keys beside each other), queries row by row (`ROWS` beside each other), all in float32,
so that the product reads both in order.  Register blocks above the diagonal, or left of the window, are not computed.

Source: https://arxiv.org/abs/2205.14135 (FlashAttention), https://arxiv.org/abs/1805.02867 (running softmax)
"""

import math
from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np

from halfbyte.kernels.native import native, store
from halfbyte.kernels.packed_attention.layout import COLUMNS, QUERIES, ROWS, SCORES, WIDTH
from halfbyte.kernels.packed_attention.packing import columns_of, rows_of, wide_rows_of

ARGUMENTS = (
    "q: T*, k: T*, v: T*, o: T*, lse: f32*, items: i32*, counter: i64*, scratch: f32*, room: i64, count: i64, tokens: i64, q_apart: i64,"
    " k_apart: i64, v_apart: i64, heads: i64, group: i64, dim: i64, window: i64, scale: f32, softcap: f32"
)
_NONE = np.float32(-np.inf)


def room(heads: int, dim: int) -> int:
    """float32 numbers that one thread needs for `heads` heads of width `dim` at once."""
    wide = -(-dim // COLUMNS) * COLUMNS
    return SCORES * dim + SCORES * wide + heads * QUERIES * (dim + wide + 2) + QUERIES * SCORES


@native(ARGUMENTS, T=("bf16", "f32"), lazy=True)
def forward() -> Callable[..., Any]:
    from halfbyte.kernels.packed_attention.vectors import multiply_across, multiply_scores, row_cap, row_exp, row_max, take

    @no_type_check
    def kernel(
        q, k, v, o, lse, items, counter, scratch, room, count, tokens, q_apart, k_apart, v_apart, heads, group, dim, window, scale,
        softcap, first, last,
    ):  # fmt: skip
        wide = (dim + COLUMNS - 1) // COLUMNS * COLUMNS
        for slot in range(first, last):
            at_k = slot * room
            at_v = at_k + SCORES * dim
            at_q = at_v + SCORES * wide
            item = take(counter)
            while item < count:
                begin, q0, q1 = np.int64(items[5 * item]), np.int64(items[5 * item + 1]), np.int64(items[5 * item + 2])
                head0, many = np.int64(items[5 * item + 3]), np.int64(items[5 * item + 4])
                at_o = at_q + many * QUERIES * dim
                at_m = at_o + many * QUERIES * wide
                at_l = at_m + many * QUERIES
                at_s = at_l + many * QUERIES
                rows = q1 - q0
                tiles = (rows + ROWS - 1) // ROWS
                for h in range(many):
                    rows_of(q, q0 * q_apart + (head0 + h) * dim, q_apart, rows, dim, scale, scratch, at_q + h * QUERIES * dim)
                for i in range(many * QUERIES):
                    scratch[at_m + i] = _NONE
                    scratch[at_l + i] = np.float32(0)
                key = max(begin, q0 - window + 1) if window > 0 else begin
                keep = 0
                while key < q1:
                    keys = min(SCORES, q1 - key)
                    columns_of(k, key * k_apart + head0 // group * dim, k_apart, keys, dim, scratch, at_k)
                    wide_rows_of(v, key * v_apart + head0 // group * dim, v_apart, keys, dim, wide, np.float32(1), scratch, at_v)
                    for h in range(many):
                        at_h = at_q + h * QUERIES * dim
                        for tile in range(tiles):
                            start = q0 + tile * ROWS
                            end = min(start + ROWS, q1)
                            low = max(0, start - window + 1 - key) if window > 0 else 0
                            high = min(keys, end - key)
                            here = at_s + tile * ROWS * SCORES
                            for panel in range(low // COLUMNS, (high + COLUMNS - 1) // COLUMNS):
                                multiply_across(
                                    scratch, at_h + tile * ROWS * dim, ROWS, at_k + panel * COLUMNS * dim, COLUMNS,
                                    here + panel * COLUMNS, SCORES, dim, 0,
                                )  # fmt: skip
                            for token in range(start, end):
                                row = token - q0
                                left = max(0, token - window + 1 - key) if window > 0 else 0
                                right = min(keys, token + 1 - key)
                                at = at_s + row * SCORES
                                out = at_o + (h * QUERIES + row) * wide
                                if right <= left:
                                    for c in range(low, high):
                                        scratch[at + c] = np.float32(0)
                                    continue
                                skipped = left // WIDTH * WIDTH
                                vectors = (right - skipped + WIDTH - 1) // WIDTH
                                if softcap > 0:
                                    row_cap(scratch, at + skipped, vectors, softcap)
                                before = scratch[at_m + h * QUERIES + row]
                                top = max(before, row_max(scratch, at + skipped, vectors, left - skipped, right - skipped))
                                shift = top if top > _NONE else np.float32(0)
                                total = row_exp(scratch, at + skipped, vectors, left - skipped, right - skipped, shift)
                                for c in range(low, skipped):
                                    scratch[at + c] = np.float32(0)
                                for c in range(skipped + vectors * WIDTH, high):
                                    scratch[at + c] = np.float32(0)
                                if keep:
                                    less = np.float32(math.exp(before - shift))
                                    total += scratch[at_l + h * QUERIES + row] * less
                                    if less != 1:
                                        for c in range(wide):
                                            scratch[out + c] *= less
                                scratch[at_m + h * QUERIES + row] = top
                                scratch[at_l + h * QUERIES + row] = total
                            for panel in range(wide // COLUMNS):
                                multiply_scores(
                                    scratch, here + low, 1, at_v + low * wide + panel * COLUMNS, wide,
                                    at_o + (h * QUERIES + tile * ROWS) * wide + panel * COLUMNS, wide, high - low, keep,
                                )  # fmt: skip
                    keep = 1
                    key += SCORES
                for h in range(many):
                    for row in range(rows):
                        total = scratch[at_l + h * QUERIES + row]
                        lse[(head0 + h) * tokens + q0 + row] = scratch[at_m + h * QUERIES + row] + np.float32(math.log(total))
                        inverse = np.float32(1) / total
                        source = at_o + (h * QUERIES + row) * wide
                        target = ((q0 + row) * heads + head0 + h) * dim
                        for c in range(dim):
                            store(o, target + c, scratch[source + c] * inverse)
                item = take(counter)

    return kernel
