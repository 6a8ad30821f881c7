"""The gated MLP of a decoder layer as one function: residual add, norm, gate and up, activation, down, residual add.

    s = r + d                              the residual stream; d is what attention adds to it
    n = RMSNorm(s)
    g = n W_g^T ...    u = n W_u^T ...     with low-rank updates (kernels/lora_linear)
    out = s + (act(g) * u) W_d^T ...

Kept for the backward pass: s, 1/rms, g, u.  n and act(g) * u are computed again from them, which costs no matrix product.  With
keep=False g and u are computed again too (two products).  The product with W_d is never repeated: the backward pass does not need its
result.  A caller that runs the whole layer again says so (`without_down`), and what then comes out is not to be looked at.

Where g and u are not kept, long inputs go through in tiles of TILE rows, so that the inner width F is held for a tile only.

Source: https://arxiv.org/abs/2002.05202 (SwiGLU); which tensors to keep: docs/memory.md
Shapes: r, d (T, H) -> out (T, H);  g, u (T, F)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.kernels.gated_mlp import gated_act, gated_act_backward
from halfbyte.kernels.lora_linear import Frozen, Norm, Projection, project, project_backward
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward


@dataclass(frozen=True)
class Mlp:
    """inner: gate and up, or one projection holding both, gate first; down; act as in kernels/gated_mlp."""

    inner: tuple[Projection, ...]
    down: Projection
    act: str


def gated_mlp(residual_TH: Tensor, delta_TH: Tensor, norm: Norm, mlp: Mlp, keep: bool = True) -> Tensor:
    """(T, H) the residual stream after the block; differentiable in both inputs and all factors."""
    factors = [factor for projection in (*mlp.inner, mlp.down) for factor in projection.factors]
    return _GatedMlp.apply(residual_TH, delta_TH, norm, _Bare(tuple(p.bare for p in mlp.inner), mlp.down.bare, mlp.act), keep, *factors)


@dataclass(frozen=True)
class _Bare:
    """An Mlp without its factors."""

    inner: tuple[Frozen, ...]
    down: Frozen
    act: str


def _split(mlp: _Bare, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if len(outputs) == 2:
        return outputs[0], outputs[1]
    gate, up = outputs[0].chunk(2, dim=-1)
    return gate.contiguous(), up.contiguous()


TILE = 4096  # rows: at 14,336 inner columns in bf16 a tile of g is 117 MB, and the products are long enough to be fast
_repeating: ContextVar[bool] = ContextVar("repeating", default=False)


@contextmanager
def without_down() -> Iterator[None]:
    """Inside, a block keeps what its backward pass needs and leaves out its last product."""
    token = _repeating.set(True)
    try:
        yield
    finally:
        _repeating.reset(token)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, delta: Tensor, norm: Norm, mlp: _Bare, keep: bool, *factors: Tensor) -> Tensor:
        summed, normed, rstd = add_rms_norm(residual, delta, norm.weight, norm.eps, norm.form)
        inner, repeating = sum(2 for p in mlp.inner if p.adapted), _repeating.get()
        kept: tuple[Tensor, ...] = ()
        out = summed.detach() if repeating else torch.empty_like(summed)
        if keep or not repeating:
            for rows in _tiles(summed, keep):
                gate, up = _split(mlp, project(normed[rows], mlp.inner, factors[:inner]))
                kept = (gate, up) if keep else ()
                if not repeating:
                    (down,) = project(gated_act(gate, up, mlp.act), (mlp.down,), factors[inner:])
                    torch.add(summed[rows], down, out=out[rows])
                del gate, up
        ctx.save_for_backward(summed, rstd, *kept, *factors)
        ctx.norm, ctx.mlp, ctx.keep, ctx.inner = norm, mlp, keep, inner
        return out

    @staticmethod
    @once_differentiable  # a second derivative would be wrong, not missing
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        dout, norm, mlp, inner = upstream[0].contiguous(), ctx.norm, ctx.mlp, ctx.inner
        summed, rstd, *rest = ctx.saved_tensors
        kept, factors = (rest[:2], rest[2:]) if ctx.keep else ([], rest)
        dsummed = torch.empty_like(summed)
        totals: list[Tensor] = []
        for rows in _tiles(summed, ctx.keep):
            normed = rms_norm(summed[rows], norm.weight, norm.eps, norm.form)[0]
            gate, up = kept or _split(mlp, project(normed, mlp.inner, factors[:inner]))
            h, dgate, dup = gated_act_backward(_into_down(dout[rows], mlp.down, factors[inner:]), gate, up, mlp.act)
            del gate, up
            of_down = project_backward(h, (dout[rows],), (mlp.down,), factors[inner:], False)[1]
            del h
            dinner = (dgate, dup) if len(mlp.inner) == 2 else (torch.cat([dgate, dup], dim=-1),)
            dnormed, of_inner = project_backward(normed, dinner, mlp.inner, factors[:inner], True)
            assert dnormed is not None
            dsummed[rows] = rms_norm_backward(dnormed, summed[rows], norm.weight, rstd[rows], norm.form, dout[rows])
            parts = [*of_inner, *of_down]
            totals = [total.add_(part) for total, part in zip(totals, parts)] if totals else parts
        return (dsummed, dsummed, None, None, None, *totals)


def _tiles(rows_TH: Tensor, keep: bool) -> list[slice]:
    """All rows at once where g and u are kept, else TILE at a time."""
    count = rows_TH.shape[0]
    size = max(count, 1) if keep else TILE
    return [slice(first, min(first + size, count)) for first in range(0, max(count, 1), size)]


def _into_down(dout: Tensor, down: Frozen, factors: Sequence[Tensor]) -> Tensor:
    """d(act(g) * u) = dout W_d + s (dout B) A."""
    dh = dout @ down.weight(dout.dtype)
    if down.adapted:
        a, b = factors
        dh.addmm_(dout @ b.to(dout.dtype), a.to(dout.dtype), alpha=down.scaling)
    return dh
