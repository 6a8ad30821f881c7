"""Rows of queries, keys and values as float32 blocks in the order the products read them; compiled into each kernel."""

import numpy as np

from halfbyte.kernels.native import inline, load
from halfbyte.kernels.packed_attention.layout import COLUMNS, ROWS


@inline
def rows_of(source, at, apart, rows, dim, scale, room, target):  # type: ignore[no-untyped-def]
    """[tile][dim][ROWS]: `ROWS` rows beside each other, times `scale`."""
    for row in range(rows):
        place = target + row // ROWS * (ROWS * dim) + row % ROWS
        for d in range(dim):
            room[place + d * ROWS] = load(source, at + row * apart + d) * scale


@inline
def columns_of(source, at, apart, rows, dim, room, target):  # type: ignore[no-untyped-def]
    """[panel][dim][COLUMNS]: the transpose, `COLUMNS` rows beside each other."""
    for row in range(rows):
        place = target + row // COLUMNS * (COLUMNS * dim) + row % COLUMNS
        for d in range(dim):
            room[place + d * COLUMNS] = load(source, at + row * apart + d)


@inline
def wide_rows_of(source, at, apart, rows, dim, wide, scale, room, target):  # type: ignore[no-untyped-def]
    """[row][wide]: as they lie, each in a row of `wide` numbers, times `scale`; what is beyond `dim` is never stored in a result."""
    for row in range(rows):
        for d in range(dim):
            room[target + row * wide + d] = load(source, at + row * apart + d) * np.float32(scale)
