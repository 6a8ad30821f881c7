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
from halfbyte.kernels.packed_attention.layout import COLUMNS, QUERIES, ROWS, SCORES
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
    from halfbyte.kernels.packed_attention.tiles import add_rows, scores_of, seen, softmax_row, transposed
    from halfbyte.kernels.packed_attention.vectors import take

    @no_type_check
    def kernel(
        q, k, v, o, lse, items, counter, scratch, room, count, tokens, q_apart, k_apart, v_apart, heads, group, dim, window, scale,
        softcap, first, last,
    ):  # fmt: skip
        wide, deep = (dim + COLUMNS - 1) // COLUMNS * COLUMNS, (dim + SCORES - 1) // SCORES * SCORES
        for slot in range(first, last):
            at_k = slot * room
            at_v, at_q = at_k + SCORES * wide, at_k + 2 * SCORES * wide
            item = take(counter)
            while item < count:
                begin, q0, q1 = np.int64(items[5 * item]), np.int64(items[5 * item + 1]), np.int64(items[5 * item + 2])
                head0, rows = np.int64(items[5 * item + 3]), q1 - q0
                many, shared = np.int64(items[5 * item + 4]), head0 // group * dim
                at_top = at_q + many * QUERIES * deep
                at_total, at_s, at_o = at_top + many * QUERIES, at_top + 2 * many * QUERIES, at_top + QUERIES * (2 * many + SCORES)
                for h in range(many):
                    block_of(q, q0 * q_apart + (head0 + h) * dim, q_apart, rows, dim, scale, scratch, at_q + h * QUERIES * deep)
                for i in range(many * QUERIES):
                    scratch[at_top + i], scratch[at_total + i] = _NONE, np.float32(0)
                key = max(begin, q0 - window + 1) if window > 0 else begin
                keep = 0
                while key < q1:
                    keys = min(SCORES, q1 - key)
                    # keys lie in the values' room until they are transposed
                    wide_rows_of(k, key * k_apart + shared, k_apart, keys, dim, wide, scratch, at_v)
                    transposed(scratch, at_v, keys, dim, wide, at_k)
                    wide_rows_of(v, key * v_apart + shared, v_apart, keys, dim, wide, scratch, at_v)
                    for h in range(many):
                        for start in range(0, rows, ROWS):
                            end = min(start + ROWS, rows)
                            low, high = seen(q0 + start, key, keys, window)[0], seen(q0 + end - 1, key, keys, window)[1]
                            here, line = at_s + start * SCORES, h * QUERIES + start
                            scores_of(scratch, at_q + h * QUERIES * deep + start * SCORES, at_k, dim, wide, low, high, here)
                            for row in range(end - start):
                                left, right = seen(q0 + start + row, key, keys, window)
                                softmax_row(
                                    scratch, here + row * SCORES, left, right, low, high, softcap, at_top + line + row,
                                    at_total + line + row, at_o + (line + row) * wide, wide, keep,
                                )  # fmt: skip
                            add_rows(scratch, here, low, high, at_v, wide, at_o + line * wide, keep)
                    keep = 1
                    key += SCORES
                for h in range(many):
                    for row in range(rows):
                        line, total = h * QUERIES + row, scratch[at_total + h * QUERIES + row]
                        lse[(head0 + h) * tokens + q0 + row] = scratch[at_top + line] + np.float32(math.log(total))
                        target, inverse = ((q0 + row) * heads + head0 + h) * dim, np.float32(1) / total
                        for c in range(dim):
                            store(o, target + c, scratch[at_o + line * wide + c] * inverse)
                item = take(counter)

    return kernel
