"""quantize_blockwise on the CPU: the reference's bits, some 50 times its speed.

Per block: the largest |x| as an integer maximum over the sign-cleared bit patterns (so that NaN, the largest pattern, cannot hide), then
16 numbers at a time are scaled, ranked among the thresholds and packed (`vectors.py`); no table of a format is in here.  The shorter
last block, and blocks that are no multiple of 32, go one by one.  bfloat16 is widened in registers, float16 by torch in pieces.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.native import inline, load, native
from halfbyte.kernels.quantize_blockwise.reference import SMALLEST, thresholds_of

PIECE = 1 << 20  # elements of a float16 tensor widened at a time
_SMALLEST = np.float32(SMALLEST)
_ONE = np.float32(1)


@inline
def top_of(x, start, size):  # type: ignore[no-untyped-def]
    """The largest magnitude of a block, NaN above all."""
    top = np.uint32(0)
    for i in range(start, start + size):
        top = max(top, np.float32(load(x, i)).view(np.uint32) & np.uint32(0x7FFFFFFF))
    return np.uint32(top).view(np.float32)


@inline
def rank_of(value: Any, thresholds: Any, bits: Any) -> Any:
    """How many of 2^bits - 1 rising thresholds lie below `value`; none for NaN."""
    rank: Any = 0
    for bit in range(bits - 1, -1, -1):
        rank += np.int64(value > thresholds[rank + (1 << bit) - 1]) << bit
    return rank


@native(
    "x: T*, thresholds: f32*, order: f32*, indices: u8*, blocksize: i64, numel: i64, begin: i64, packed: u8*, absmax: f32*",
    T=("bf16", "f32"), lazy=True,
)  # fmt: skip
def pack() -> Any:
    """Blocks begin + first..begin + last, 16 levels.  `order`, `indices`: which level has a rank, as int32 and as bytes."""
    from halfbyte.kernels.vectors import larger, largest, load16, magnitude_bits, rank16, splat, store_pairs, times

    def kernel(  # type: ignore[no-untyped-def]
        x, thresholds, order, indices, blocksize, numel, begin, packed, absmax, first, last
    ):
        steps, codes = load16(thresholds, 0), load16(order, 0)
        for block in range(begin + first, begin + last):
            start = block * blocksize
            size = min(blocksize, numel - start)
            if size == blocksize and size & 31 == 0:
                top = magnitude_bits(load16(x, start))
                for i in range(16, size, 16):
                    top = larger(top, magnitude_bits(load16(x, start + i)))
                scale = largest(top)
                absmax[block] = scale
                factor = splat(_ONE / max(scale, _SMALLEST))
                for i in range(0, size, 16):
                    store_pairs(packed, (start + i) >> 1, codes, rank16(times(load16(x, start + i), factor), steps))
                continue
            scale = top_of(x, start, size)
            divisor = max(scale, _SMALLEST)
            absmax[block] = scale if size == blocksize else divisor
            for i in range(0, size, 2):
                byte = 0
                for j in range(i, i + 2):
                    value = np.float32(0)
                    if j < size:
                        value = load(x, start + j)
                        value = value * (_ONE / divisor) if size == blocksize else value / divisor
                    byte = (byte << 4) | indices[rank_of(value, thresholds, 4)]
                packed[(start + i) >> 1] = byte

    return kernel


@native(
    "x: T*, thresholds: f32*, order: u8*, blocksize: i64, numel: i64, begin: i64, indices: u8*, absmax: f32*", T=("bf16", "f32")
)  # fmt: skip
def index(x, thresholds, order, blocksize, numel, begin, indices, absmax, first, last):  # type: ignore[no-untyped-def]
    """The same for 256 levels."""
    for block in range(begin + first, begin + last):
        start = block * blocksize
        size = min(blocksize, numel - start)
        scale = top_of(x, start, size)
        divisor = max(scale, _SMALLEST)
        absmax[block] = scale
        if size == blocksize:
            factor = _ONE / divisor
            for i in range(start, start + size):
                indices[i] = order[rank_of(load(x, i) * factor, thresholds, 8)]
        else:
            for i in range(start, start + size):
                indices[i] = order[rank_of(load(x, i) / divisor, thresholds, 8)]


@lru_cache(maxsize=16)
def _tables(levels: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(thresholds, padded to 16; order as int32 seen as float32; order as bytes) of a codebook."""
    midpoints, order = thresholds_of(torch.tensor(levels, dtype=torch.float32))
    padded = torch.cat([midpoints, torch.full((1,), torch.inf)])
    return padded, order.to(torch.int32).view(torch.float32), order.to(torch.uint8)



def quantize_blockwise(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x fp32, bf16 or fp16 of any shape -> (packed or indices uint8, absmax fp32)."""
    flat = x.detach().contiguous().reshape(-1)
    if flat.dtype == torch.float16:
        return _in_pieces(flat, codebook, blocksize)
    count = flat.numel()
    blocks = -(-count // blocksize)
    stored = torch.empty((count + 1) // 2 if codebook.numel() == 16 else count, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    thresholds, order, indices = _tables(tuple(codebook.tolist()))
    if codebook.numel() == 16:
        pack(blocks, flat, thresholds, order, indices, blocksize, count, 0, stored, absmax, work=count)
    else:
        index(blocks, flat, thresholds, indices, blocksize, count, 0, stored, absmax, work=count)
    return stored, absmax


def _in_pieces(flat: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float16: widened piece by piece; a piece is whole blocks, so the pieces' bytes are those of the whole."""
    size = max(1, PIECE // blocksize) * blocksize
    parts = [quantize_blockwise(piece.float(), codebook, blocksize) for piece in flat.split(size)]
    return torch.cat([stored for stored, _ in parts]), torch.cat([absmax for _, absmax in parts])
