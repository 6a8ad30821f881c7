"""Sizes of the CPU kernels' blocks, from the processor they are made for.

WIDTH     float32 lanes of a vector
ROWS, COLUMNS   the register block of a product: 12 x 32 sums in 24 of AVX-512's 32 registers, 6 x 16 in 12 of AVX2's 16
QUERIES   rows of a block of queries; SCORES: keys of a block.  Both are whole numbers of register blocks either way round, and a
          block of scores (96 x 192 float32, 72 KiB) with its keys and values stays in a second-level cache.
"""

from halfbyte.kernels import instructions

WIDTH = {"avx512": 16, "avx2": 8, "plain": 4}[instructions.level()]
ROWS, COLUMNS = 12 if WIDTH == 16 else 6, 2 * WIDTH
QUERIES, SCORES = 96, 192
