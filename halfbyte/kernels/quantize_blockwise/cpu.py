"""quantize_blockwise on the CPU with numba: the reference's bits, some 20 times its speed.

Per block: the largest |x| as an integer maximum over the sign-cleared bit patterns (so that NaN, the largest pattern, cannot hide),
then every element's rank as a sum of comparisons, which compiles to vector code on any instruction set; no table of a format is
in here.  float16 is widened to float32 in pieces by torch, bfloat16 in registers.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

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
def _float32(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


# The loops below are functions of whole arrays: with 0..size as the only range, the compiler sees that no index is negative
# and turns them into vector code; as loops over start..stop they ran eight times slower.


@njit(nogil=True)
def _largest(x: np.ndarray, mask: Any) -> Any:
    """The largest bit pattern of x with the sign cleared by `mask`; NaN is the largest of all."""
    top: Any = x[0] & mask
    for i in range(x.size):
        top = max(top, x[i] & mask)
    return top


@njit(nogil=True)
def _times(x: np.ndarray, factor: float, value_of: Callable[[Any], Any], scaled: np.ndarray) -> None:
    for i in range(x.size):
        scaled[i] = value_of(x[i]) * factor


@njit(nogil=True)
def _over(x: np.ndarray, divisor: float, value_of: Callable[[Any], Any], scaled: np.ndarray) -> None:
    for i in range(x.size):
        scaled[i] = value_of(x[i]) / divisor


@njit(nogil=True)
def _scale_block(x: np.ndarray, mask: Any, value_of: Callable[[Any], Any], blocksize: int, scaled: np.ndarray) -> Any:
    """scaled[:size] = x / absmax by the rule of the op; returns absmax.  `value_of` turns bits into a float32."""
    top: Any = value_of(_largest(x, mask))
    if x.size == blocksize:
        _times(x, np.float32(1) / max(top, _SMALLEST), value_of, scaled)
    else:
        _over(x, max(top, _SMALLEST), value_of, scaled)
    return top


@njit(nogil=True)
def _rank(scaled: np.ndarray, thresholds: tuple, ranks: np.ndarray) -> None:
    """ranks = how many of 15 thresholds lie below."""
    for i in range(scaled.size):
        value, rank = scaled[i], np.uint8(0)
        for j in range(15):
            rank += np.uint8(value > thresholds[j])
        ranks[i] = rank


@njit(nogil=True)
def _join(ranks: np.ndarray, pairs: np.ndarray, packed: np.ndarray) -> None:
    for k in range(packed.size):
        packed[k] = pairs[np.int64(ranks[2 * k]) * 16 + ranks[2 * k + 1]]


@njit(nogil=True)
def _search(scaled: np.ndarray, thresholds: np.ndarray, order: np.ndarray, indices: np.ndarray) -> None:
    """indices of 256 levels by a binary search over the 255 thresholds."""
    for i in range(indices.size):
        value, rank = scaled[i], 0
        for bit in range(7, -1, -1):
            rank += (value > thresholds[rank + (1 << bit) - 1]) << bit
        indices[i] = order[rank]


@njit(nogil=True)
def pack_range(
    x: np.ndarray, mask: Any, value_of: Callable[[Any], Any], thresholds: tuple, pairs: np.ndarray, blocksize: int,
    first: int, last: int, packed: np.ndarray, absmax: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of the bits x, 16 levels.  pairs[16 * a + b] is the byte of the ranks a (even element) and b (odd element)."""
    scaled, ranks = np.zeros(blocksize, np.float32), np.empty(blocksize, np.uint8)
    for block in range(first, last):
        start = block * blocksize
        size = min(blocksize, x.size - start)
        even = size + size % 2
        top = _scale_block(x[start : start + size], mask, value_of, blocksize, scaled)
        absmax[block] = top if size == blocksize else max(top, _SMALLEST)
        scaled[size:even] = 0
        _rank(scaled[:even], thresholds, ranks)
        _join(ranks, pairs, packed[start // 2 : (start + even) // 2])


@njit(nogil=True)
def index_range(
    x: np.ndarray, mask: Any, value_of: Callable[[Any], Any], thresholds: np.ndarray, order: np.ndarray, blocksize: int,
    first: int, last: int, indices: np.ndarray, absmax: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of the bits x, 256 levels."""
    scaled = np.empty(blocksize, np.float32)
    for block in range(first, last):
        part = slice(block * blocksize, min((block + 1) * blocksize, x.size))
        absmax[block] = _scale_block(x[part], mask, value_of, blocksize, scaled)
        _search(scaled, thresholds, order, indices[part])


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
    mask: Any
    value_of, mask = (widen, np.uint16(0x7FFF)) if narrow else (_float32, np.uint32(0x7FFFFFFF))
    small, large, order, pairs = _tables(tuple(codebook.tolist()))
    count = flat.numel()
    blocks = -(-count // blocksize)
    stored = torch.empty((count + 1) // 2 if codebook.numel() == 16 else count, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    out, scales = stored.numpy(), absmax.numpy()

    def work(first: int, last: int) -> None:
        if codebook.numel() == 16:
            pack_range(bits, mask, value_of, small, pairs, blocksize, first, last, out, scales)
        else:
            index_range(bits, mask, value_of, large, order, blocksize, first, last, out, scales)

    run_ranges(work, blocks, blocksize)
    return stored, absmax


def _in_pieces(flat: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float16: widened piece by piece; a piece is whole blocks, so the pieces' bytes are those of the whole."""
    size = max(1, PIECE // blocksize) * blocksize
    parts = [quantize_blockwise(piece.float(), codebook, blocksize) for piece in flat.split(size)]
    return torch.cat([stored for stored, _ in parts]), torch.cat([absmax for _, absmax in parts])
