"""adamw on the CPU: one pass, everything between two reads in registers; 8-bit moments block by block.

An 8-bit block is gone through twice, for its scale is known only when all its moments are: the first pass updates the parameter and
finds the largest moments, the second makes the moments again from the old indices, the same bits, and rounds them.
float64 and tensors that do not lie in one piece take the reference.

Where the processor has fused multiply-add the moments have the reference's bits.  The parameter may differ from it in the last bit, for
the root here is correctly rounded, and MKL's, which PyTorch takes, is not.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.adamw import reference
from halfbyte.kernels.native import inline, inline_fused, load, native
from halfbyte.kernels.quantize_blockwise.reference import SMALLEST, thresholds_of

BLOCKSIZE = 256
_ABS = np.int32(0x7FFFFFFF)
_SMALLEST, _ZERO, _ONE = np.float32(SMALLEST), np.float32(0), np.float32(1)


@inline_fused
def _first(m, g, keep1):  # type: ignore[no-untyped-def]
    """m + (1 - beta1) (g - m), fused where the processor can, as torch.lerp is."""
    return m + keep1 * (g - m)


@inline_fused
def _second(v, g, beta2, keep2):  # type: ignore[no-untyped-def]
    return beta2 * v + (keep2 * g) * g


@inline
def _rank(value, starts, edges, steps):  # type: ignore[no-untyped-def]
    """How many of 255 thresholds lie below; see `_tables`."""
    rank = np.int32(starts[np.float32(value).view(np.uint32) >> np.uint32(16)])
    for _ in range(steps):
        rank += np.int32(value > edges[rank])
    return rank


@native(
    "p: f32*, g: T*, m: f32*, v: f32*, keep1: f32, beta2: f32, keep2: f32, decay: f32, rate: f32, correction: f32, eps: f32",
    T=("bf16", "f32"), apart=True,
)  # fmt: skip
def _float32(
    p: Any, g: Any, m: Any, v: Any, keep1: float, beta2: float, keep2: float, decay: float, rate: float, correction: float, eps: float,
    first: int, last: int,
) -> None:  # fmt: skip
    for i in range(first, last):
        gradient = load(g, i)
        one = _first(m[i], gradient, keep1)
        two = _second(v[i], gradient, beta2, keep2)
        m[i], v[i] = one, two
        p[i] = p[i] * decay + (rate * one) / (np.sqrt(two) / correction + eps)


@native(
    "p: f32*, g: T*, mi: u8*, ma: f32*, vi: u8*, va: f32*, m_levels: f32*, v_levels: f32*, m_edges: f32*, v_edges: f32*, "
    "m_starts: u8*, v_starts: u8*, m_order: u8*, v_order: u8*, m_steps: i64, v_steps: i64, numel: i64, "
    "keep1: f32, beta2: f32, keep2: f32, decay: f32, rate: f32, correction: f32, eps: f32",
    T=("bf16", "f32"), apart=True,
)  # fmt: skip
def _int8(
    p: Any, g: Any, mi: Any, ma: Any, vi: Any, va: Any, m_levels: Any, v_levels: Any, m_edges: Any, v_edges: Any, m_starts: Any,
    v_starts: Any, m_order: Any, v_order: Any, m_steps: int, v_steps: int, numel: int, keep1: float, beta2: float, keep2: float,
    decay: float, rate: float, correction: float, eps: float, first: int, last: int,
) -> None:  # fmt: skip
    for block in range(first, last):
        start = block * BLOCKSIZE
        size = min(BLOCKSIZE, numel - start)
        m_old, v_old = ma[block], va[block]
        m_top, v_top = np.int32(0), np.int32(0)  # as bits, so that NaN is the largest of all
        for k in range(size):
            i = start + k
            gradient = load(g, i)
            one = _first(m_levels[mi[i]] * m_old, gradient, keep1)
            two = _second(v_levels[vi[i]] * v_old, gradient, beta2, keep2)
            m_top = max(m_top, np.float32(one).view(np.int32) & _ABS)
            v_top = max(v_top, np.float32(two).view(np.int32) & _ABS)
            p[i] = p[i] * decay + (rate * one) / (np.sqrt(two) / correction + eps)
        m_new, v_new = np.int32(m_top).view(np.float32), np.int32(v_top).view(np.float32)
        ma[block], va[block] = m_new, v_new
        m_over, v_over = max(m_new, _SMALLEST), max(v_new, _SMALLEST)
        m_by, v_by, whole = _ONE / m_over, _ONE / v_over, size == BLOCKSIZE  # quantize_blockwise divides in a shorter block
        for k in range(size):
            i = start + k
            one = _first(m_levels[mi[i]] * m_old, load(g, i), keep1)
            mi[i] = m_order[_rank(one * m_by if whole else one / m_over, m_starts, m_edges, m_steps)]
        for k in range(size):
            i = start + k
            two = _second(v_levels[vi[i]] * v_old, load(g, i), beta2, keep2)
            index = v_order[_rank(two * v_by if whole else two / v_over, v_starts, v_edges, v_steps)]
            vi[i] = index + np.uint8((index == 0) & (two > _ZERO))


@lru_cache(maxsize=8)
def _tables(levels: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, int]:
    """(255 thresholds and infinity, starts, order, steps) of a codebook.

    starts[b] is how many thresholds lie below all numbers whose upper 16 bits are b, steps the most that lie among those of one b: from
    its start a number reaches its rank in so many comparisons, of which none waits for eight others as in a binary search.
    """
    edges, order = thresholds_of(torch.tensor(levels, dtype=torch.float32))
    upper = torch.arange(1 << 16, dtype=torch.int64)
    near, far = (((upper << 16 | low) << 32 >> 32).to(torch.int32).view(torch.float32) for low in (0, 0xFFFF))
    lowest, highest = torch.where(upper < 1 << 15, near, far), torch.where(upper < 1 << 15, far, near)
    # NaN is above no threshold
    starts, ends = (torch.searchsorted(edges, value, right=False).masked_fill(near.isnan() | far.isnan(), 0) for value in (lowest, highest))
    return torch.cat([edges, edges.new_full((1,), torch.inf)]), starts.to(torch.uint8), order.to(torch.uint8), int((ends - starts).max())


def _numbers(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    """keep1, beta2, keep2, decay, rate, correction, eps, each rounded once from double precision, as PyTorch's scalars are."""
    return 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, -lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, eps


def _plain(p: Tensor, grad: Tensor, *others: Tensor) -> bool:
    fits = p.dtype == torch.float32 and grad.dtype in (torch.float32, torch.bfloat16)
    return fits and all(part.is_contiguous() for part in (p, grad, *others))


def adamw_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    """p, m, v in place."""
    if not _plain(p, grad, m, v):
        reference.adamw_(p, grad, m, v, lr, beta1, beta2, eps, weight_decay, step)
        return
    _float32(p.numel(), p.detach(), grad, m, v, *_numbers(lr, beta1, beta2, eps, weight_decay, step))


def adamw_int8_(
    p: Tensor, grad: Tensor, m_indices: Tensor, m_absmax: Tensor, v_indices: Tensor, v_absmax: Tensor, m_codebook: Tensor,
    v_codebook: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """p and the moments in place."""
    state = m_indices, m_absmax, v_indices, v_absmax
    if not _plain(p, grad, *state):
        reference.adamw_int8_(p, grad, *state, m_codebook, v_codebook, lr, beta1, beta2, eps, weight_decay, step)
        return
    m, v = (_tables(tuple(codebook.tolist())) for codebook in (m_codebook, v_codebook))
    _int8(
        m_absmax.numel(), p.detach(), grad, *state, m_codebook.contiguous(), v_codebook.contiguous(),
        *(table for pair in zip(m, v) for table in pair), p.numel(), *_numbers(lr, beta1, beta2, eps, weight_decay, step),
    )
