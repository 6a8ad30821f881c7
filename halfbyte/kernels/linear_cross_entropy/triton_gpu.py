"""linear_cross_entropy's chunk in Triton: loss and gradient of the logits, in place.

A program takes one row of logits: one pass for the running maximum and sum (m, s), where a new maximum m' turns s into s e^(m - m'), and
one pass that writes softmax - onehot over the logits.  A row is read twice and written once, in its own type; the difference p - 1 of the
true class is formed in fp32.  Nothing of the size of the logits is made.

Proven in Triton's interpreter against the reference; compiled for sm_90 and sm_80, not yet timed on a GPU.
Source: https://arxiv.org/abs/1805.02867 (online softmax), https://arxiv.org/abs/2410.10989 (Liger: gradient in place)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.triton_launch import launch, power_of_2

TILE = 4096  # logits of one step


@triton.jit
def _capped(z, softcap, scale, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the logit that the softmax sees, its derivative by the one that was stored)."""
    z = z * scale
    if CAPPED:
        t = 1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0)  # tanh, good to 1e-7 absolutely, at both infinities too
        return softcap * t, scale * (1.0 - t * t)
    else:
        return z, tl.full(z.shape, 1.0, tl.float32) * scale


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    z, labels, losses, vocabulary, z_row, softcap, scale, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int32)
    start_of_row = z + row * z_row
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.zeros((WIDTH,), tl.float32)
    true = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, vocabulary, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < vocabulary
        value, _ = _capped(tl.load(start_of_row + column, mask=inside, other=0.0).to(tl.float32), softcap, scale, CAPPED)
        value = tl.where(inside, value, float("-inf"))
        larger = tl.maximum(m, tl.max(value, axis=0))
        against = tl.where(larger == float("-inf"), 0.0, larger)  # nothing but -inf so far: no difference of infinities
        s = s * tl.exp(m - against) + tl.exp(value - against)
        m = larger
        true += tl.where(column == label, value, 0.0)
    total = tl.sum(s, axis=0)
    tl.store(losses + row, tl.log(total) + (m - tl.sum(true, axis=0)))  # the small term last, for rows that are nearly sure
    if GRADIENT:
        for start in range(0, vocabulary, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = column < vocabulary
            value, slope = _capped(tl.load(start_of_row + column, mask=inside, other=0.0).to(tl.float32), softcap, scale, CAPPED)
            dz = tl.exp(value - m) / total - tl.where(column == label, 1.0, 0.0)
            tl.store(start_of_row + column, (dz * slope).to(z.dtype.element_ty), mask=inside)


def cross_entropy_(z: Tensor, labels: Tensor, softcap: float | None, scale: float, gradient: bool) -> Tensor:
    """() fp32 sum of the losses of z (n, V) with labels (n,) in 0..V-1; z becomes its gradient where `gradient`."""
    if z.stride(1) != 1:
        beside = z.contiguous()
        total = cross_entropy_(beside, labels, softcap, scale, gradient)
        z.copy_(beside)
        return total
    rows, vocabulary = z.shape
    losses = z.new_empty(rows, dtype=torch.float32)
    launch(
        _row, rows, z, labels.contiguous(), losses, vocabulary, z.stride(0), softcap or 1.0, scale, warps=8,
        CAPPED=softcap is not None, GRADIENT=gradient, WIDTH=min(TILE, power_of_2(vocabulary)),
    )  # fmt: skip
    return losses.sum()
