"""dequantize_blockwise on the CPU with numba: the reference's bits.

Portable: a level is picked by four selections over the bits of its index, which compiles to vector code on any instruction set
(a look-up in memory would not); then scaled and rounded.  With AVX-512: `avx512.py` for whole blocks.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from halfbyte.kernels.bfloat16_bits import narrow
from halfbyte.kernels.dequantize_blockwise import avx512
from halfbyte.kernels.ranges import run_ranges

_unpack_groups: Any = avx512.unpack_groups  # an intrinsic: its Python signature has one argument more
PIECE = 1 << 18  # elements of a float16 result narrowed at a time


@njit(inline="always")
def _as_it_is(value: Any) -> Any:
    return np.float32(value)


@njit(inline="always")
def _pick(index: Any, t: tuple) -> Any:
    """t[index] of 16 without a branch."""
    one, two, four, eight = (index & 1) != 0, (index & 2) != 0, (index & 4) != 0, (index & 8) != 0
    a, b, c, d = t[1] if one else t[0], t[3] if one else t[2], t[5] if one else t[4], t[7] if one else t[6]
    e, f, g, h = t[9] if one else t[8], t[11] if one else t[10], t[13] if one else t[12], t[15] if one else t[14]
    a, c, e, g = b if two else a, d if two else c, f if two else e, h if two else g
    a, e = c if four else a, g if four else e
    return e if eight else a


@njit(nogil=True)
def unpack_range(
    packed: np.ndarray, absmax: np.ndarray, levels: tuple, rounded: Callable[[Any], Any], blocksize: int,
    first: int, last: int, numel: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of 16 levels, portable; `out` begins at element first * blocksize."""
    for block in range(first, last):
        start = block * blocksize
        size = min(blocksize, numel - start)
        source = packed[start // 2 : (start + size + 1) // 2]
        target = out[start - first * blocksize : start - first * blocksize + size]
        scale = absmax[block]
        for k in range(size // 2):
            target[2 * k] = rounded(_pick(source[k] >> 4, levels) * scale)
            target[2 * k + 1] = rounded(_pick(source[k] & 15, levels) * scale)
        if size % 2:
            target[size - 1] = rounded(_pick(source[size // 2] >> 4, levels) * scale)


@njit(nogil=True)
def _unpack_range_avx512(
    packed: np.ndarray, absmax: np.ndarray, codebook: np.ndarray, blocksize: int, first: int, last: int, out: np.ndarray
) -> None:
    """Whole blocks first..last of 16 levels, blocksize a multiple of 32; `out` begins at element first * blocksize."""
    for block in range(first, last):
        start = block * blocksize
        _unpack_groups(codebook, absmax[block], packed, start // 2, out, start - first * blocksize, blocksize // avx512.GROUP)


@njit(nogil=True)
def _look_up_range(
    indices: np.ndarray, absmax: np.ndarray, codebook: np.ndarray, rounded: Callable[[Any], Any], blocksize: int,
    first: int, last: int, numel: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Blocks first..last of 256 levels; `out` begins at element first * blocksize."""
    begin = first * blocksize
    for block in range(first, last):
        start = block * blocksize
        for i in range(start, min(start + blocksize, numel)):
            out[i - begin] = rounded(codebook[indices[i]] * absmax[block])


@lru_cache(maxsize=16)
def _as_tuple(levels: tuple[float, ...]) -> tuple:
    return tuple(np.array(levels, np.float32))


def dequantize_blockwise(
    stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype, portable: bool = False
) -> Tensor:
    """stored (ceil(n/2),) or (n,) uint8, absmax (N,) fp32 -> (n,) of `dtype` fp32, bf16 or fp16; `portable` leaves AVX-512 alone."""
    source, scales, table = (part.detach().contiguous().reshape(-1).numpy() for part in (stored, absmax, codebook))
    levels = _as_tuple(tuple(codebook.tolist())) if codebook.numel() == 16 else ()
    rounded = narrow if dtype == torch.bfloat16 else _as_it_is
    vector = len(levels) == 16 and not portable and blocksize % avx512.GROUP == 0 and not avx512.missing()
    whole = numel // blocksize
    out = torch.empty(numel, dtype=dtype)

    def fill(first: int, last: int, target: np.ndarray) -> None:
        if not levels:
            _look_up_range(source, scales, table, rounded, blocksize, first, last, numel, target)
            return
        middle = max(first, min(last, whole)) if vector else first
        if middle > first:
            _unpack_range_avx512(source, scales, table, blocksize, first, middle, target)
        if middle < last:
            rest = target[(middle - first) * blocksize :]
            unpack_range(source, scales, levels, rounded, blocksize, middle, last, numel, rest)

    def work(first: int, last: int) -> None:
        if dtype != torch.float16:
            part = out[first * blocksize : min(last * blocksize, numel)]
            fill(first, last, (part.view(torch.uint16) if dtype == torch.bfloat16 else part).numpy())
            return
        step = max(1, PIECE // blocksize)
        for block in range(first, last, step):
            begin, end = block * blocksize, min((block + step) * blocksize, last * blocksize, numel)
            piece = torch.empty(end - begin, dtype=torch.float32)
            fill(block, min(block + step, last), piece.numpy())
            out[begin:end] = piece

    run_ranges(work, -(-numel // blocksize), blocksize)
    return out
