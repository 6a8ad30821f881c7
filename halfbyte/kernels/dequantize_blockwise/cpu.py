"""dequantize_blockwise on the CPU with numba: the reference's bits.

The 16 levels are scaled and rounded once per block; each element is then a look-up.
"""

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from halfbyte.kernels.bfloat16_bits import narrow
from halfbyte.kernels.ranges import run_ranges

PIECE = 1 << 20  # elements of a float16 result narrowed at a time


@njit(inline="always")
def _as_it_is(value: float) -> float:
    return np.float32(value)


@njit(nogil=True)
def _unpack_range(
    packed: np.ndarray, absmax: np.ndarray, codebook: np.ndarray, rounded: Callable[[float], float], blocksize: int,
    first: int, last: int, numel: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of 16 levels; `out` begins at element first * blocksize."""
    scaled = np.empty(16, out.dtype)
    for block in range(first, last):
        start = np.int64(block) * blocksize
        size = min(blocksize, numel - start)
        for level in range(16):
            scaled[level] = rounded(codebook[level] * absmax[block])
        half, at = start // 2, start - np.int64(first) * blocksize
        for k in range(size // 2):
            byte = packed[half + k]
            out[at + 2 * k] = scaled[byte >> 4]
            out[at + 2 * k + 1] = scaled[byte & 15]
        if size % 2:
            out[at + size - 1] = scaled[packed[half + size // 2] >> 4]


@njit(nogil=True)
def _look_up_range(
    indices: np.ndarray, absmax: np.ndarray, codebook: np.ndarray, rounded: Callable[[float], float], blocksize: int,
    first: int, last: int, numel: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of 256 levels; `out` begins at element first * blocksize."""
    begin = np.int64(first) * blocksize
    for block in range(first, last):
        start = np.int64(block) * blocksize
        for i in range(start, min(start + blocksize, numel)):
            out[i - begin] = rounded(codebook[indices[i]] * absmax[block])


def dequantize_blockwise(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    """stored (ceil(n/2),) or (n,) uint8, absmax (N,) fp32 -> (n,) of `dtype` fp32, bf16 or fp16."""
    kernel = _unpack_range if codebook.numel() == 16 else _look_up_range
    stored_np, absmax_np, codebook_np = (part.detach().contiguous().reshape(-1).numpy() for part in (stored, absmax, codebook))
    rounded = narrow if dtype == torch.bfloat16 else _as_it_is
    out = torch.empty(numel, dtype=dtype)

    def work(first: int, last: int) -> None:
        begin, end = first * blocksize, min(last * blocksize, numel)
        if dtype == torch.float16:
            step = max(1, PIECE // blocksize)
            for block in range(first, last, step):
                stop = min(block + step, last)
                piece = torch.empty(min(stop * blocksize, numel) - block * blocksize, dtype=torch.float32)
                kernel(stored_np, absmax_np, codebook_np, _as_it_is, blocksize, block, stop, numel, piece.numpy())
                out[block * blocksize : block * blocksize + piece.numel()] = piece
            return
        part = out[begin:end]
        view = part.view(torch.uint16) if dtype == torch.bfloat16 else part
        kernel(stored_np, absmax_np, codebook_np, rounded, blocksize, first, last, numel, view.numpy())

    run_ranges(work, -(-numel // blocksize), blocksize)
    return out
