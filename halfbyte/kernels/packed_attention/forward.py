"""The forward kernel: one item is a block of queries of a few heads that share keys; softmax is kept as running maximum and sum.

    per block of keys:   s = q k^T,   m' = max(m, rowmax s),   p = exp(s - m'),   l = l e^(m - m') + rowsum p,   o = o e^(m - m') + p v
    at the end:          o / l,   lse = m + ln l

All is widened to float32 once.  Keys are laid down transposed, `COLUMNS` of them beside each other, so that the product reads them in
order.  Register blocks above the diagonal, or left of the window, are not computed.

Source: https://arxiv.org/abs/2205.14135 (FlashAttention), https://arxiv.org/abs/1805.02867 (running softmax)
"""

import math
from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np

from halfbyte.kernels.native import native, store
from halfbyte.kernels.packed_attention.layout import COLUMNS, QUERIES, ROWS, SCORES, WIDTH
from halfbyte.kernels.packed_attention.packing import block_of, wide_rows_of

ARGUMENTS = (
    "q: T*, k: T*, v: T*, o: T*, lse: f32*, items: i32*, counter: i64*, scratch: f32*, room: i64, count: i64, tokens: i64, q_apart: i64,"
    " k_apart: i64, v_apart: i64, heads: i64, group: i64, dim: i64, window: i64, scale: f32, softcap: f32"
)
_NONE = np.float32(-np.inf)


def room(heads: int, dim: int) -> int:
    """float32 numbers that one thread needs for `heads` heads of width `dim` at once."""
    wide = -(-dim // COLUMNS) * COLUMNS
    deep = -(-dim // SCORES) * SCORES
    return 2 * SCORES * wide + heads * QUERIES * (deep + wide + 2) + QUERIES * SCORES


@native(ARGUMENTS, T=("bf16", "f32"), lazy=True, apart=True)
def forward() -> Callable[..., Any]:
    from halfbyte.kernels.packed_attention.vectors import multiply_rows, row_cap, row_exp, row_max, take, transpose

    @no_type_check
    def kernel(
        q, k, v, o, lse, items, counter, scratch, room, count, tokens, q_apart, k_apart, v_apart, heads, group, dim, window, scale,
        softcap, first, last,
    ):  # fmt: skip
        wide = (dim + COLUMNS - 1) // COLUMNS * COLUMNS
        deep = (dim + SCORES - 1) // SCORES * SCORES
        for slot in range(first, last):
            at_k = slot * room
            at_v = at_k + SCORES * wide
            at_q = at_v + SCORES * wide
            item = take(counter)
            while item < count:
                begin, q0, q1 = np.int64(items[5 * item]), np.int64(items[5 * item + 1]), np.int64(items[5 * item + 2])
                head0, many = np.int64(items[5 * item + 3]), np.int64(items[5 * item + 4])
                at_o = at_q + many * QUERIES * deep
                at_m = at_o + many * QUERIES * wide
                at_l = at_m + many * QUERIES
                at_s = at_l + many * QUERIES
                rows = q1 - q0
                tiles = (rows + ROWS - 1) // ROWS
                for h in range(many):
                    block_of(q, q0 * q_apart + (head0 + h) * dim, q_apart, rows, dim, scale, scratch, at_q + h * QUERIES * deep)
                for i in range(many * QUERIES):
                    scratch[at_m + i] = _NONE
                    scratch[at_l + i] = np.float32(0)
                key = max(begin, q0 - window + 1) if window > 0 else begin
                keep = 0
                while key < q1:
                    keys = min(SCORES, q1 - key)
                    # keys lie in the values' room until they are transposed
                    wide_rows_of(k, key * k_apart + head0 // group * dim, k_apart, keys, dim, wide, scratch, at_v)
                    for row in range(0, keys, WIDTH):
                        panel = at_k + row // COLUMNS * wide * COLUMNS + row % COLUMNS
                        for d in range(0, dim, WIDTH):
                            transpose(scratch, at_v + row * wide + d, wide, panel + d * COLUMNS, COLUMNS)
                    wide_rows_of(v, key * v_apart + head0 // group * dim, v_apart, keys, dim, wide, scratch, at_v)
                    for h in range(many):
                        at_h = at_q + h * QUERIES * deep
                        for tile in range(tiles):
                            start = q0 + tile * ROWS
                            end = min(start + ROWS, q1)
                            low = max(0, start - window + 1 - key) if window > 0 else 0
                            high = min(keys, end - key)
                            here = at_s + tile * ROWS * SCORES
                            for panel in range(low // COLUMNS, (high + COLUMNS - 1) // COLUMNS):
                                for d in range(0, dim, SCORES):
                                    multiply_rows(
                                        scratch, at_h + d * QUERIES + tile * ROWS * SCORES, 1, at_k + (panel * wide + d) * COLUMNS, COLUMNS,
                                        here + panel * COLUMNS, SCORES, min(SCORES, dim - d), d,
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
                                multiply_rows(
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
