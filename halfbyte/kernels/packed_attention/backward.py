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

from halfbyte.kernels.native import native, store
from halfbyte.kernels.packed_attention.layout import COLUMNS, QUERIES, ROWS, SCORES, WIDTH
from halfbyte.kernels.packed_attention.packing import block_of, wide_rows_of

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
    deep = -(-dim // SCORES) * SCORES
    return padded(longest) * 5 * wide + QUERIES * (2 * deep + wide + 1) + 2 * QUERIES * SCORES


@native(ARGUMENTS, T=("bf16", "f32"), lazy=True, apart=True)
def backward() -> Callable[..., Any]:
    from halfbyte.kernels.packed_attention.vectors import multiply_columns, multiply_rows, row_cap, row_dot, row_grad, take, transpose

    @no_type_check
    def kernel(
        do, q, k, v, o, lse, dq, dk, dv, partial, items, counter, scratch, room, longest, count, tokens, do_apart, q_apart, k_apart,
        v_apart, heads, group, dim, window, scale, softcap, split, first, last,
    ):  # fmt: skip
        wide = (dim + COLUMNS - 1) // COLUMNS * COLUMNS
        deep = (dim + SCORES - 1) // SCORES * SCORES
        held = (longest + QUERIES - 1) // QUERIES * QUERIES
        inverse_cap = np.float32(1) / softcap if softcap > 0 else np.float32(0)
        for slot in range(first, last):
            at_kt = slot * room
            at_vt = at_kt + held * wide
            at_k = at_vt + held * wide
            at_dk = at_k + held * wide
            at_dv = at_dk + held * wide
            at_q = at_dv + held * wide
            at_do = at_q + QUERIES * deep
            at_dq = at_do + QUERIES * deep
            at_delta = at_dq + QUERIES * wide
            at_s = at_delta + QUERIES
            at_d = at_s + QUERIES * SCORES
            item = take(counter)
            while item < count:
                begin, end = np.int64(items[5 * item]), np.int64(items[5 * item + 2])
                head0, many = np.int64(items[5 * item + 3]), np.int64(items[5 * item + 4])
                shared = head0 // group * dim
                # values lie in the room of dk until they are transposed
                wide_rows_of(k, begin * k_apart + shared, k_apart, end - begin, dim, wide, scratch, at_k)
                wide_rows_of(v, begin * v_apart + shared, v_apart, end - begin, dim, wide, scratch, at_dk)
                for row in range(0, end - begin, WIDTH):
                    panel = row // COLUMNS * wide * COLUMNS + row % COLUMNS
                    for d in range(0, dim, WIDTH):
                        transpose(scratch, at_k + row * wide + d, wide, at_kt + panel + d * COLUMNS, COLUMNS)
                        transpose(scratch, at_dk + row * wide + d, wide, at_vt + panel + d * COLUMNS, COLUMNS)
                for i in range((end - begin + ROWS - 1) // ROWS * ROWS * wide):
                    scratch[at_dk + i] = np.float32(0)
                    scratch[at_dv + i] = np.float32(0)
                for head in range(head0, head0 + many):
                    for q0 in range(begin, end, QUERIES):
                        q1 = min(q0 + QUERIES, end)
                        rows = q1 - q0
                        tiles = (rows + ROWS - 1) // ROWS
                        block_of(q, q0 * q_apart + head * dim, q_apart, rows, dim, scale, scratch, at_q)
                        block_of(do, q0 * do_apart + head * dim, do_apart, rows, dim, np.float32(1), scratch, at_do)
                        # the output lies in the room of dq until delta is known
                        wide_rows_of(o, (q0 * heads + head) * dim, heads * dim, rows, dim, wide, scratch, at_dq)
                        for row in range(rows):
                            delta = np.float32(0)
                            for d in range(0, dim, SCORES):
                                width = min(SCORES, dim - d)
                                here, there = at_do + d * QUERIES + row * SCORES, at_dq + row * wide + d
                                delta += row_dot(scratch, here, there, width // WIDTH)
                                for c in range(width // WIDTH * WIDTH, width):
                                    delta += scratch[here + c] * scratch[there + c]
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
                                    for d in range(0, dim, SCORES):
                                        row, column = d * QUERIES + tile * ROWS * SCORES, ((at + panel * COLUMNS) * wide) + d * COLUMNS
                                        depth = min(SCORES, dim - d)
                                        multiply_rows(scratch, at_q + row, 1, at_kt + column, COLUMNS, at_s + place, SCORES, depth, d)
                                        multiply_rows(scratch, at_do + row, 1, at_vt + column, COLUMNS, at_d + place, SCORES, depth, d)
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
                                    multiply_rows(
                                        scratch, at_d + tile * ROWS * SCORES + low, 1, at_k + (at + low) * wide + panel * COLUMNS, wide,
                                        at_dq + tile * ROWS * wide + panel * COLUMNS, wide, high - low, keep,
                                    )  # fmt: skip
                            for column in range(0, keys, ROWS):
                                # rows that see a key of this tile: none before its first, none `window` after its last
                                low = max(0, key + column - q0)
                                high = min(rows, key + column + ROWS - 1 + window - q0) if window > 0 else rows
                                for panel in range(wide // COLUMNS):
                                    target = (at + column) * wide + panel * COLUMNS
                                    source = panel * COLUMNS // SCORES * QUERIES * SCORES + low * SCORES + panel * COLUMNS % SCORES
                                    multiply_columns(
                                        scratch, at_s + low * SCORES + column, SCORES, at_do + source, SCORES, at_dv + target, wide,
                                        high - low, 1,
                                    )  # fmt: skip
                                    multiply_columns(
                                        scratch, at_d + low * SCORES + column, SCORES, at_q + source, SCORES, at_dk + target, wide,
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
