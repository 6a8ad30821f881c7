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

from halfbyte.kernels.native import load, native, store
from halfbyte.kernels.packed_attention.layout import COLUMNS, QUERIES, ROWS, SCORES, WIDTH
from halfbyte.kernels.packed_attention.packing import columns_of, rows_of, wide_rows_of

ARGUMENTS = (
    "do: T*, q: T*, k: T*, v: T*, o: T*, lse: f32*, dq: T*, dk: T*, dv: T*, partial: f32*, items: i32*, counter: i64*, scratch: f32*,"
    " room: i64, longest: i64, count: i64, tokens: i64, do_apart: i64, q_apart: i64, k_apart: i64, v_apart: i64, heads: i64, group: i64,"
    " dim: i64, window: i64, scale: f32, softcap: f32, split: i64"
)


def padded(longest: int) -> int:
    """Rows of the buffers that hold a whole segment's keys: whole register blocks in both directions."""
    return -(-longest // QUERIES) * QUERIES


def room(longest: int, dim: int) -> int:
    """float32 numbers that one thread needs for segments of up to `longest` tokens."""
    wide = -(-dim // COLUMNS) * COLUMNS
    return padded(longest) * (2 * dim + 3 * wide) + QUERIES * (2 * dim + 3 * wide + 1) + 2 * QUERIES * SCORES


@native(ARGUMENTS, T=("bf16", "f32"), lazy=True)
def backward() -> Callable[..., Any]:
    from halfbyte.kernels.packed_attention.vectors import multiply_across, multiply_scores, row_cap, row_grad, take

    @no_type_check
    def kernel(
        do, q, k, v, o, lse, dq, dk, dv, partial, items, counter, scratch, room, longest, count, tokens, do_apart, q_apart, k_apart,
        v_apart, heads, group, dim, window, scale, softcap, split, first, last,
    ):  # fmt: skip
        wide = (dim + COLUMNS - 1) // COLUMNS * COLUMNS
        held = (longest + QUERIES - 1) // QUERIES * QUERIES
        inverse_cap = np.float32(1) / softcap if softcap > 0 else np.float32(0)
        for slot in range(first, last):
            at_kt = slot * room
            at_vt = at_kt + held * dim
            at_k = at_vt + held * dim
            at_dk = at_k + held * wide
            at_dv = at_dk + held * wide
            at_qt = at_dv + held * wide
            at_dot = at_qt + QUERIES * dim
            at_q = at_dot + QUERIES * dim
            at_do = at_q + QUERIES * wide
            at_dq = at_do + QUERIES * wide
            at_delta = at_dq + QUERIES * wide
            at_s = at_delta + QUERIES
            at_d = at_s + QUERIES * SCORES
            item = take(counter)
            while item < count:
                begin, end = np.int64(items[5 * item]), np.int64(items[5 * item + 2])
                head0, many = np.int64(items[5 * item + 3]), np.int64(items[5 * item + 4])
                shared = head0 // group * dim
                columns_of(k, begin * k_apart + shared, k_apart, end - begin, dim, scratch, at_kt)
                columns_of(v, begin * v_apart + shared, v_apart, end - begin, dim, scratch, at_vt)
                wide_rows_of(k, begin * k_apart + shared, k_apart, end - begin, dim, wide, np.float32(1), scratch, at_k)
                for i in range((end - begin + ROWS - 1) // ROWS * ROWS * wide):
                    scratch[at_dk + i] = np.float32(0)
                    scratch[at_dv + i] = np.float32(0)
                for head in range(head0, head0 + many):
                    for q0 in range(begin, end, QUERIES):
                        q1 = min(q0 + QUERIES, end)
                        rows = q1 - q0
                        tiles = (rows + ROWS - 1) // ROWS
                        rows_of(q, q0 * q_apart + head * dim, q_apart, rows, dim, scale, scratch, at_qt)
                        wide_rows_of(q, q0 * q_apart + head * dim, q_apart, rows, dim, wide, scale, scratch, at_q)
                        rows_of(do, q0 * do_apart + head * dim, do_apart, rows, dim, np.float32(1), scratch, at_dot)
                        wide_rows_of(do, q0 * do_apart + head * dim, do_apart, rows, dim, wide, np.float32(1), scratch, at_do)
                        for row in range(rows):
                            delta = np.float32(0)
                            for d in range(dim):
                                delta += scratch[at_do + row * wide + d] * load(o, ((q0 + row) * heads + head) * dim + d)
                            scratch[at_delta + row] = delta
                        low_key = max(begin, q0 - window + 1) if window > 0 else begin
                        key = begin + (low_key - begin) // SCORES * SCORES
                        keep = 0
                        while key < q1:
                            keys = min(SCORES, q1 - key)
                            padded_keys = (keys + COLUMNS - 1) // COLUMNS * COLUMNS
                            at = key - begin
                            for tile in range(tiles):
                                start = q0 + tile * ROWS
                                stop = min(start + ROWS, q1)
                                low = max(0, start - window + 1 - key) if window > 0 else 0
                                high = min(keys, stop - key)
                                for panel in range(low // COLUMNS, (high + COLUMNS - 1) // COLUMNS):
                                    place = tile * ROWS * SCORES + panel * COLUMNS
                                    column = (at + panel * COLUMNS) * dim
                                    multiply_across(
                                        scratch, at_qt + tile * ROWS * dim, ROWS, at_kt + column, COLUMNS, at_s + place, SCORES, dim, 0
                                    )
                                    multiply_across(
                                        scratch, at_dot + tile * ROWS * dim, ROWS, at_vt + column, COLUMNS, at_d + place, SCORES, dim, 0
                                    )
                                for token in range(start, stop):
                                    row = token - q0
                                    left = max(0, token - window + 1 - key) if window > 0 else 0
                                    right = min(keys, token + 1 - key)
                                    scores, slopes = at_s + row * SCORES, at_d + row * SCORES
                                    if right <= left:
                                        left, right = 0, 0
                                    skipped = left // WIDTH * WIDTH
                                    vectors = (right - skipped + WIDTH - 1) // WIDTH
                                    if softcap > 0:
                                        row_cap(scratch, scores + skipped, vectors, softcap)
                                    row_grad(
                                        scratch, scores + skipped, slopes + skipped, vectors, left - skipped, right - skipped,
                                        lse[head * tokens + token], scratch[at_delta + row], inverse_cap,
                                    )  # fmt: skip
                                    for c in range(skipped):
                                        scratch[scores + c] = np.float32(0)
                                        scratch[slopes + c] = np.float32(0)
                                    for c in range(skipped + vectors * WIDTH, padded_keys):
                                        scratch[scores + c] = np.float32(0)
                                        scratch[slopes + c] = np.float32(0)
                                for panel in range(wide // COLUMNS):
                                    multiply_scores(
                                        scratch, at_d + tile * ROWS * SCORES + low, 1, at_k + (at + low) * wide + panel * COLUMNS, wide,
                                        at_dq + tile * ROWS * wide + panel * COLUMNS, wide, high - low, keep,
                                    )  # fmt: skip
                            for column in range(0, keys, ROWS):
                                # rows that see a key of this tile: none before its first, none `window` after its last
                                low = max(0, key + column - q0)
                                high = min(rows, key + column + ROWS - 1 + window - q0) if window > 0 else rows
                                for panel in range(wide // COLUMNS):
                                    target = (at + column) * wide + panel * COLUMNS
                                    source = low * wide + panel * COLUMNS
                                    multiply_across(
                                        scratch, at_s + low * SCORES + column, SCORES, at_do + source, wide, at_dv + target, wide,
                                        high - low, 1,
                                    )  # fmt: skip
                                    multiply_across(
                                        scratch, at_d + low * SCORES + column, SCORES, at_q + source, wide, at_dk + target, wide,
                                        high - low, 1,
                                    )  # fmt: skip
                            keep = 1
                            key += SCORES
                        for row in range(rows):
                            target = ((q0 + row) * heads + head) * dim
                            for d in range(dim):
                                store(dq, target + d, scratch[at_dq + row * wide + d] * scale)
                if split:
                    for row in range(end - begin):
                        target = ((begin + row) * heads + head0) * dim
                        for d in range(dim):
                            partial[target + d] = scratch[at_dk + row * wide + d]
                        target += tokens * heads * dim
                        for d in range(dim):
                            partial[target + d] = scratch[at_dv + row * wide + d]
                else:
                    for row in range(end - begin):
                        target = (begin + row) * (heads // group) * dim + shared
                        for d in range(dim):
                            store(dk, target + d, scratch[at_dk + row * wide + d])
                        for d in range(dim):
                            store(dv, target + d, scratch[at_dv + row * wide + d])
                item = take(counter)

    return kernel
