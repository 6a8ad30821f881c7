"""The backward kernel: one item is a segment and some heads that share keys; probabilities are made again from lse.

    p = exp(s - lse),   delta = rowsum(do * o),   ds = p (do v^T - delta)        (softcap: times 1 - (s / cap)^2)
    dv += p^T do,       dk += ds^T q,             dq += ds k                     with q scaled, so that dq is scaled once at its end

dk and dv are summed over the blocks of queries and the heads of the item in float32 and rounded once.  Where a segment's heads are
divided between items (one long segment, many threads) each head leaves float32 sums in `partial` (2, tokens, heads, dim) instead.

Source: https://arxiv.org/abs/2307.08691 (FlashAttention-2, algorithm 2); soft cap: https://arxiv.org/abs/2408.00118
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np

from halfbyte.kernels.native import native
from halfbyte.kernels.packed_attention.layout import COLUMNS, QUERIES, ROWS, SCORES
from halfbyte.kernels.packed_attention.packing import block_of, rounded_rows_to, wide_rows_of

ARGUMENTS = (
    "do: T*, q: T*, k: T*, v: T*, o: T*, lse: f32*, dq: T*, dk: T*, dv: T*, partial: f32*, items: i32*, counter: i64*, scratch: f32*,"
    " room: i64, longest: i64, count: i64, tokens: i64, do_apart: i64, q_apart: i64, k_apart: i64, v_apart: i64, heads: i64, group: i64,"
    " dim: i64, window: i64, scale: f32, softcap: f32, split: i64"
)

_ONE = np.float32(1)


def room(longest: int, dim: int) -> int:
    """float32 numbers that one thread needs for segments of up to `longest` tokens."""
    wide = -(-dim // COLUMNS) * COLUMNS
    deep = -(-dim // SCORES) * SCORES
    held = -(-longest // QUERIES) * QUERIES  # whole register blocks in both directions
    return 5 * held * wide + QUERIES * (2 * deep + wide + 1) + 2 * QUERIES * SCORES


@native(ARGUMENTS, T=("bf16", "f32"), lazy=True, apart=True)
def backward() -> Callable[..., Any]:
    from halfbyte.kernels.packed_attention.tiles import add_columns, add_rows, clear, delta_of, gradients_of_rows, rows_that_see, transposed
    from halfbyte.kernels.packed_attention.vectors import take

    @no_type_check
    def kernel(
        do, q, k, v, o, lse, dq, dk, dv, partial, items, counter, scratch, room, longest, count, tokens, do_apart, q_apart, k_apart,
        v_apart, heads, group, dim, window, scale, softcap, split, first, last,
    ):  # fmt: skip
        wide, deep = (dim + COLUMNS - 1) // COLUMNS * COLUMNS, (dim + SCORES - 1) // SCORES * SCORES
        held = (longest + QUERIES - 1) // QUERIES * QUERIES * wide
        for slot in range(first, last):
            at_kt, at_vt, at_k = slot * room, slot * room + held, slot * room + 2 * held
            at_dk, at_dv, at_q = at_k + held, at_k + 2 * held, at_k + 3 * held
            at_do, at_dq, at_s = at_q + QUERIES * deep, at_q + 2 * QUERIES * deep, at_q + QUERIES * (2 * deep + wide)
            at_d, at_delta = at_s + QUERIES * SCORES, at_s + 2 * QUERIES * SCORES
            item = take(counter)
            while item < count:
                begin, end, head0 = np.int64(items[5 * item]), np.int64(items[5 * item + 2]), np.int64(items[5 * item + 3])
                size, shared, apart = end - begin, head0 // group * dim, heads // group * dim
                # values lie in the room of dk until they are transposed
                wide_rows_of(k, begin * k_apart + shared, k_apart, size, dim, wide, scratch, at_k)
                wide_rows_of(v, begin * v_apart + shared, v_apart, size, dim, wide, scratch, at_dk)
                transposed(scratch, at_k, size, dim, wide, at_kt)
                transposed(scratch, at_dk, size, dim, wide, at_vt)
                clear(scratch, at_dk, at_dk + (size + ROWS - 1) // ROWS * ROWS * wide)
                clear(scratch, at_dv, at_dv + (size + ROWS - 1) // ROWS * ROWS * wide)
                for head in range(head0, head0 + np.int64(items[5 * item + 4])):
                    for q0 in range(begin, end, QUERIES):
                        rows = min(QUERIES, end - q0)
                        block_of(q, q0 * q_apart + head * dim, q_apart, rows, dim, scale, scratch, at_q)
                        block_of(do, q0 * do_apart + head * dim, do_apart, rows, dim, _ONE, scratch, at_do)
                        # the output lies in the room of dq until delta is known
                        wide_rows_of(o, (q0 * heads + head) * dim, heads * dim, rows, dim, wide, scratch, at_dq)
                        for row in range(rows):
                            scratch[at_delta + row] = delta_of(scratch, at_do + row * SCORES, at_dq + row * wide, dim)
                        lowest = (max(begin, q0 - window + 1) - begin) // SCORES * SCORES if window > 0 else 0
                        for at in range(lowest, q0 + rows - begin, SCORES):
                            keys, column = min(SCORES, q0 + rows - begin - at), at * wide
                            for start in range(0, rows, ROWS):
                                low, high = gradients_of_rows(
                                    scratch, at_q, at_do, at_kt + column, at_vt + column, at_s, at_d, at_delta, lse, head * tokens + q0,
                                    q0, start, min(start + ROWS, rows), begin + at, keys, dim, wide, window, softcap,
                                )  # fmt: skip
                                add_rows(scratch, at_d + start * SCORES, low, high, at_k + column, wide, at_dq + start * wide, at - lowest)
                            for c in range(0, keys, ROWS):
                                low, high = rows_that_see(begin + at + c, q0, rows, window)
                                add_columns(scratch, at_s + c, low, high, at_do, wide, at_dv + column + c * wide)
                                add_columns(scratch, at_d + c, low, high, at_q, wide, at_dk + column + c * wide)
                        rounded_rows_to(dq, (q0 * heads + head) * dim, heads * dim, rows, dim, wide, scale, scratch, at_dq)
                if split:
                    target, half = (begin * heads + head0) * dim, tokens * heads * dim
                    rounded_rows_to(partial, target, heads * dim, size, dim, wide, _ONE, scratch, at_dk)
                    rounded_rows_to(partial, target + half, heads * dim, size, dim, wide, _ONE, scratch, at_dv)
                else:
                    rounded_rows_to(dk, begin * apart + shared, apart, size, dim, wide, _ONE, scratch, at_dk)
                    rounded_rows_to(dv, begin * apart + shared, apart, size, dim, wide, _ONE, scratch, at_dv)
                item = take(counter)

    return kernel
