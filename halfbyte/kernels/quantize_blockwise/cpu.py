"""quantize_blockwise on the CPU with numba: the reference's bits, some 20 times its speed.

Per block: the largest |x| as an integer maximum over the sign-cleared bit patterns (so that NaN, the largest pattern, cannot hide),
then every element's rank as a sum of comparisons, which compiles to vector code on any instruction set; no table of a format is
in here.  float16 is widened to float32 in pieces by torch, bfloat16 in registers.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from halfbyte.kernels.bfloat16_bits import widen
from halfbyte.kernels.quantize_blockwise.reference import SMALLEST, thresholds_of
from halfbyte.kernels.ranges import run_ranges

PIECE = 1 << 20  # elements of a float16 tensor widened at a time
_SMALLEST = np.float32(SMALLEST)


@njit(inline="always")
def _float32(bits: int) -> float:  # numba: uint32 -> float32
    return np.uint32(bits).view(np.float32)


@njit(inline="always")
def _largest(x: np.ndarray, start: int, stop: int, mask: int, value_of: Callable[[int], float]) -> float:
    """max |x[start:stop]|, NaN if any is NaN; `mask` clears the sign bit."""
    top = x[start] & mask
    for i in range(start + 1, stop):
        top = max(top, x[i] & mask)
    return value_of(top)


@njit(nogil=True)
def _pack_range(
    x: np.ndarray, mask: int, value_of: Callable[[int], float], thresholds: tuple, pairs: np.ndarray, blocksize: int,
    first: int, last: int, packed: np.ndarray, absmax: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of the bits x: 16 levels.  pairs[16 * a + b] is the byte of the ranks a (even element) and b (odd element)."""
    ranks = np.empty(blocksize + 1, np.uint8)
    for block in range(first, last):
        start = np.int64(block) * blocksize
        stop = min(start + blocksize, x.size)
        size = stop - start
        top = _largest(x, start, stop, mask, value_of)
        whole = size == blocksize
        if not whole:
            top = max(top, _SMALLEST)
        absmax[block] = top
        inverse = np.float32(1) / max(top, _SMALLEST)
        for i in range(size):
            value = value_of(x[start + i])
            value = value * inverse if whole else value / top
            rank = np.uint8(0)
            for j in range(15):
                rank += np.uint8(value > thresholds[j])
            ranks[i] = rank
        if size % 2:
            rank = np.uint8(0)
            for j in range(15):
                rank += np.uint8(np.float32(0) > thresholds[j])
            ranks[size] = rank
        half = start // 2
        for k in range((size + 1) // 2):
            packed[half + k] = pairs[np.int64(ranks[2 * k]) * 16 + ranks[2 * k + 1]]


@njit(nogil=True)
def _index_range(
    x: np.ndarray, mask: int, value_of: Callable[[int], float], thresholds: np.ndarray, order: np.ndarray, blocksize: int,
    first: int, last: int, indices: np.ndarray, absmax: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of the bits x: 256 levels, the rank by a binary search over the 255 thresholds."""
    for block in range(first, last):
        start = np.int64(block) * blocksize
        stop = min(start + blocksize, x.size)
        top = _largest(x, start, stop, mask, value_of)
        whole = stop - start == blocksize
        if not whole:
            top = max(top, _SMALLEST)
        absmax[block] = top
        inverse = np.float32(1) / max(top, _SMALLEST)
        for i in range(start, stop):
            value = value_of(x[i])
            value = value * inverse if whole else value / top
            rank = 0
            for bit in range(7, -1, -1):
                rank += (1 << bit) if value > thresholds[rank + (1 << bit) - 1] else 0
            indices[i] = order[rank]


@lru_cache(maxsize=16)
def _tables(levels: tuple[float, ...]) -> tuple[tuple, np.ndarray, np.ndarray, np.ndarray]:
    """(thresholds as a tuple, as an array, order, bytes of rank pairs) of a codebook."""
    midpoints, order = thresholds_of(torch.tensor(levels, dtype=torch.float32))
    ranks = order.to(torch.uint8).numpy()
    pairs = (ranks[:16, None] << 4 | ranks[None, :16]).reshape(-1)
    # a tuple of 15 compiles into constants in registers; 255 would not
    return tuple(midpoints.numpy()[:15]), midpoints.numpy(), ranks, pairs


def quantize_blockwise(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x fp32, bf16 or fp16 of any shape -> (packed or indices uint8, absmax fp32)."""
    flat = x.detach().contiguous().reshape(-1)
    if flat.dtype == torch.float16:
        return _in_pieces(flat, codebook, blocksize)
    narrow = flat.dtype == torch.bfloat16
    bits = flat.view(torch.uint16 if narrow else torch.uint32).numpy()
    value_of, mask = (widen, np.uint16(0x7FFF)) if narrow else (_float32, np.uint32(0x7FFFFFFF))
    small, large, order, pairs = _tables(tuple(codebook.tolist()))
    count = flat.numel()
    blocks = -(-count // blocksize)
    stored = torch.empty((count + 1) // 2 if codebook.numel() == 16 else count, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    out, scales = stored.numpy(), absmax.numpy()

    def work(first: int, last: int) -> None:
        if codebook.numel() == 16:
            _pack_range(bits, mask, value_of, small, pairs, blocksize, first, last, out, scales)
        else:
            _index_range(bits, mask, value_of, large, order, blocksize, first, last, out, scales)

    run_ranges(work, blocks, blocksize)
    return stored, absmax


def _in_pieces(flat: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float16: widened piece by piece; a piece is whole blocks, so the pieces' bytes are those of the whole."""
    size = max(1, PIECE // blocksize) * blocksize
    parts = [quantize_blockwise(piece.float(), codebook, blocksize) for piece in flat.split(size)]
    return torch.cat([stored for stored, _ in parts]), torch.cat([absmax for _, absmax in parts])
