"""Rows of queries, keys, values and gradients as float32 blocks in the order the products read them; compiled into each kernel."""

from halfbyte.kernels.native import inline, load, store
from halfbyte.kernels.packed_attention.layout import QUERIES, SCORES


@inline
def wide_rows_of(source, at, apart, rows, dim, wide, room, target):  # type: ignore[no-untyped-def]
    """[row][wide]: as they lie; what is beyond `dim` never reaches a result."""
    for row in range(rows):
        for d in range(dim):
            room[target + row * wide + d] = load(source, at + row * apart + d)


@inline
def block_of(source, at, apart, rows, dim, scale, room, target):  # type: ignore[no-untyped-def]
    """[d // SCORES][QUERIES][d % SCORES], times `scale`: rows that lie as far apart as rows of scores, whatever the head's width."""
    for begin in range(0, dim, SCORES):
        for row in range(rows):
            place = target + (begin // SCORES * QUERIES + row) * SCORES
            for d in range(min(SCORES, dim - begin)):
                room[place + d] = load(source, at + row * apart + begin + d) * scale


@inline
def rounded_rows_to(target, at, apart, rows, dim, wide, scale, room, source):  # type: ignore[no-untyped-def]
    """The other way: rows of `wide` float32 numbers, times `scale`, rounded once to the type of `target`."""
    for row in range(rows):
        for d in range(dim):
            store(target, at + row * apart + d, room[source + row * wide + d] * scale)
