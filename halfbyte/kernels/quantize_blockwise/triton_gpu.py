"""quantize_blockwise in Triton: the reference's bits.

A program takes whole blocks: the largest |x| as an integer maximum over the sign-cleared bits (a float maximum would lose a NaN),
then each element's rank by a binary search over the thresholds, 4 steps for 16 levels and 8 for 256.  Division is the correctly
rounded one.

Proven in Triton's interpreter against the reference; compiled for sm_90 and sm_80, not yet timed on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.quantize_blockwise.reference import SMALLEST, thresholds_of
from halfbyte.kernels.triton_launch import launch, power_of_2

TILE = 2048  # elements of one program
_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def at_least_smallest(absmax):  # type: ignore[no-untyped-def]
    # 1e-38 is a denormal fp32 number: written plainly it would make the maximum an fp64 one
    return tl.maximum(absmax, tl.full(absmax.shape, _SMALLEST, tl.float32))


@triton.jit
def scaled_blocks(x, whole):  # type: ignore[no-untyped-def]
    """(x / absmax, absmax) of fp32 blocks (N, K), zeros past the end; by reciprocal where the block is `whole` (N,)."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    divisor = at_least_smallest(absmax)
    factor = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    over = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    return tl.where(whole[:, None], x * factor[:, None], over), absmax


@triton.jit
def rank_of(value, thresholds, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the 2^BITS - 1 ascending thresholds lie below `value`."""
    rank = tl.zeros(value.shape, tl.int32)
    for step in tl.static_range(BITS):
        half = 1 << (BITS - 1 - step)
        rank += (value > tl.load(thresholds + rank + (half - 1))).to(tl.int32) * half
    return rank


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, stored, absmax, thresholds, order, numel, size,
    BLOCKSIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of `numel` elements into `size` bytes; WIDTH is BLOCKSIZE or the power of two above it."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, WIDTH)
    element = block[:, None] * BLOCKSIZE + column[None, :]
    inside = (element < numel) & (column < BLOCKSIZE)[None, :]
    whole = (block + 1) * BLOCKSIZE <= numel
    scaled, top = scaled_blocks(tl.load(x + element, mask=inside, other=0.0).to(tl.float32), whole)
    if PACKED:
        index = tl.load(order + rank_of(scaled, thresholds, 4)).to(tl.int32)
        first, second = tl.split(tl.reshape(index, (BLOCKS, WIDTH // 2, 2)))
        half = tl.arange(0, WIDTH // 2)
        place = block[:, None] * (BLOCKSIZE // 2) + half[None, :]
        there = (place < size) & (half < BLOCKSIZE // 2)[None, :]
        tl.store(stored + place, ((first << 4) | second).to(tl.uint8), mask=there)
        top = tl.where(whole, top, at_least_smallest(top))
    else:
        tl.store(stored + element, tl.load(order + rank_of(scaled, thresholds, 8)).to(tl.uint8), mask=inside)
    tl.store(absmax + block, top, mask=block * BLOCKSIZE < numel)


def quantize_blockwise(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x fp32, bf16 or fp16 of any shape -> (packed or indices uint8, absmax fp32)."""
    flat = x.detach().contiguous().reshape(-1)
    thresholds, order = thresholds_of(codebook)
    numel, packed, width = flat.numel(), codebook.numel() == 16, power_of_2(blocksize)
    stored = torch.empty((numel + 1) // 2 if packed else numel, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=x.device)
    blocks = max(1, TILE // width)
    launch(
        _quantize, -(-numel // (blocks * blocksize)), flat, stored, absmax, thresholds, order.to(torch.uint8), numel, stored.numel(),
        exact=True, BLOCKSIZE=blocksize, WIDTH=width, BLOCKS=blocks, PACKED=packed,
    )  # fmt: skip
    return stored, absmax
