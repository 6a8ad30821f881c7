"""dequantize_blockwise on the CPU: the reference's bits.

16 levels: the codebook is scaled and rounded once per block, 16 numbers in a register, and 32 elements at a time are looked up in it
(`vectors.py`).  What is left of a block, and 256 levels, go one by one.  Scales that are themselves quantized are read back in the same
pass: one multiplication and one addition per block, never fused, for a fused one gives other bits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.native import inline, native, store

PIECE = 1 << 18  # elements of a float16 result narrowed at a time
Nested = tuple[Tensor, Tensor, Tensor]


@inline
def scale_of(block, nested, absmax, codes, absmax2, levels2, offset):  # type: ignore[no-untyped-def]
    """The scale of a block, read back where it is stored in 8 bits (nested blocks of 256)."""
    if nested:
        return levels2[codes[block]] * absmax2[block >> 8] + offset[0]
    return absmax[block]


@inline
def level_of(packed, i, codebook):  # type: ignore[no-untyped-def]
    """The level of element i; two to a byte, the even one in the high half."""
    return codebook[(np.int64(packed[i >> 1]) >> (4 - 4 * (i & 1))) & 15]


SCALES = "nested: i64, absmax: f32*, codes: u8*, absmax2: f32*, levels2: f32*, offset: f32*"


@native(f"packed: u8*, {SCALES}, codebook: f32*, blocksize: i64, numel: i64, begin: i64, out: T*", T=("bf16", "f32"), lazy=True)
def unpack() -> Any:
    """Blocks begin + first..begin + last of 16 levels; `out` starts with block `begin`."""
    from halfbyte.kernels.vectors import as_stored, load16, splat, store_looked_up, store_looked_up_64, times

    def kernel(  # type: ignore[no-untyped-def]
        packed, nested, absmax, codes, absmax2, levels2, offset, codebook, blocksize, numel, begin, out, first, last
    ):
        levels = load16(codebook, 0)
        groups = blocksize >> 5 if blocksize & 1 == 0 else 0  # an odd block would begin inside a byte
        ahead = begin + first
        if blocksize == 64:  # by far the commonest: no inner loop
            for block in range(begin + first, min(begin + last, numel >> 6)):
                scale = scale_of(block, nested, absmax, codes, absmax2, levels2, offset)
                table = as_stored(out, times(levels, splat(scale)))
                to = (block - begin) << 6
                store_looked_up_64(out, to, table, packed, block << 5)
                ahead = block + 1
        for block in range(ahead, begin + last):
            start = block * blocksize
            size = min(blocksize, numel - start)
            to = start - begin * blocksize
            scale = scale_of(block, nested, absmax, codes, absmax2, levels2, offset)
            table = as_stored(out, times(levels, splat(scale)))
            whole = min(groups, size >> 5)
            for group in range(whole):
                store_looked_up(out, to + 32 * group, table, packed, (start >> 1) + 16 * group)
            for i in range(32 * whole, size):
                store(out, to + i, level_of(packed, start + i, codebook) * scale)

    return kernel


@native(f"indices: u8*, {SCALES}, codebook: f32*, blocksize: i64, numel: i64, begin: i64, out: T*", T=("bf16", "f32"))
def look_up_bytes(  # type: ignore[no-untyped-def]
    indices, nested, absmax, codes, absmax2, levels2, offset, codebook, blocksize, numel, begin, out, first, last
):
    """The same for 256 levels."""
    for block in range(begin + first, begin + last):
        start = block * blocksize
        to = start - begin * blocksize
        scale = scale_of(block, nested, absmax, codes, absmax2, levels2, offset)
        for i in range(min(blocksize, numel - start)):
            store(out, to + i, codebook[indices[start + i]] * scale)


def scale_arguments(absmax: Tensor, nested: Nested | None) -> tuple[Any, ...]:
    """The arguments of SCALES."""
    if nested is None:
        return 0, absmax.contiguous(), None, None, None, None
    return 1, None, absmax.contiguous(), nested[0].contiguous(), nested[1].contiguous(), nested[2]


def dequantize_blockwise(
    stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype, nested: Nested | None = None
) -> Tensor:
    """stored (ceil(n/2),) or (n,) uint8, absmax (N,) fp32, or uint8 with `nested` -> (n,) of `dtype` fp32, bf16 or fp16."""
    out = torch.empty(numel, dtype=dtype)
    dequantize_into(out, stored, absmax, codebook, blocksize, nested)
    return out


def dequantize_into(
    out: Tensor, stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, nested: Nested | None = None
) -> None:
    """The same into a contiguous tensor that is there already, so that no fresh pages are asked for."""
    numel = out.numel()
    blocks = -(-numel // blocksize)
    kernel = unpack if codebook.numel() == 16 else look_up_bytes
    front = (stored.contiguous(), *scale_arguments(absmax, nested), codebook.contiguous(), blocksize, numel)
    if out.dtype != torch.float16:
        kernel(blocks, *front, 0, out, work=numel)
        return
    step = max(1, PIECE // blocksize)
    piece = torch.empty(min(numel, step * blocksize), dtype=torch.float32)
    for block in range(0, blocks, step):
        size = min(step * blocksize, numel - block * blocksize)
        kernel(min(step, blocks - block), *front, block, piece, work=size)
        out.view(-1)[block * blocksize : block * blocksize + size] = piece[:size]
