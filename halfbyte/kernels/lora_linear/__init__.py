"""lora_linear: frozen linear maps with low-rank updates that share one input, forward and backward as few passes as there are products.

    y_p  = x W_p^T + b_p + s_p (x A_p^T) B_p^T                 for each projection p (query, key, value share x)
    u_p  = s_p (dy_p B_p)                                      computed once, used twice
    dx   = sum_p  dy_p W_p + u_p A_p                           skipped where x asks for no gradient
    dA_p = u_p^T x          dB_p = s_p dy_p^T (x A_p^T)

Kept for the backward pass: x, nothing else; x A^T is computed again, which is a product with R columns.  A frozen weight is asked for
at each use (`Projection.weight`), so a packed one is dense for the length of one product.  With `normed`, x is the input of an RMSNorm and
the normalised rows are computed again too.  Products accumulate in float32; the factors may be wider than x and get gradients
of their own type.

Does not: dropout, DoRA (lora/layer.py does), gradients of W or b.
Source: https://arxiv.org/abs/2106.09685; the order of the products as in https://arxiv.org/abs/2305.14314, appendix
Shapes: x (T, I); W (O, I), b (O,), A (R, I), B (O, R) -> y (T, O)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from halfbyte.kernels.rms_norm import rms_norm as _rms_norm
from halfbyte.kernels.rms_norm import rms_norm_backward


@dataclass(frozen=True)
class Projection:
    """One frozen map and its update.  weight(dtype) -> (O, I) of that dtype, without gradient; factors are (A, B), or nothing."""

    weight: Callable[[torch.dtype], Tensor]
    bias: Tensor | None = None
    factors: tuple[Tensor, ...] = ()
    scaling: float = 1.0

    @property
    def bare(self) -> "Frozen":
        """What it is without its factors, which autograd wants as inputs of their own."""
        return Frozen(self.weight, self.bias, self.scaling, bool(self.factors))


@dataclass(frozen=True)
class Frozen:
    """A projection whose factors stand elsewhere; `adapted` says whether it has any."""

    weight: Callable[[torch.dtype], Tensor]
    bias: Tensor | None
    scaling: float
    adapted: bool


@dataclass(frozen=True)
class Norm:
    """An RMSNorm before the projections: `form` as in kernels/rms_norm; its weight is frozen."""

    weight: Tensor
    eps: float
    form: int


def lora_linear(x_TI: Tensor, projections: Sequence[Projection], normed: Norm | None = None) -> tuple[Tensor, ...]:
    """(T, O_p) for each projection; differentiable in x and in all factors."""
    factors = [factor for projection in projections for factor in projection.factors]
    return _LoraLinear.apply(x_TI, tuple(projection.bare for projection in projections), normed, *factors)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: tuple[Frozen, ...], normed: Norm | None, *factors: Tensor) -> tuple[Tensor, ...]:
        h, rstd = (x, None) if normed is None else _rms_norm(x, normed.weight, normed.eps, normed.form)
        ctx.save_for_backward(x, rstd, *factors)
        ctx.projections, ctx.normed = projections, normed
        return project(h, projections, factors)

    @staticmethod
    @once_differentiable  # a second derivative would be wrong, not missing
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, *factors = ctx.saved_tensors
        normed: Norm | None = ctx.normed
        h = x if normed is None else _rms_norm(x, normed.weight, normed.eps, normed.form)[0]
        dh, gradients = project_backward(h, dys, ctx.projections, factors, ctx.needs_input_grad[0])
        if normed is not None and dh is not None:
            dh = rms_norm_backward(dh, x, normed.weight, rstd, normed.form)
        return (dh, None, None, *gradients)


def project(h: Tensor, projections: Sequence[Frozen], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The forward products; `factors` are the A and B of the adapted projections, in their order."""
    outputs = []
    lows = _low(h, factors[::2])
    left = list(zip(lows, factors[1::2]))
    for projection in projections:
        y = linear(h, projection.weight(h.dtype), _as(projection.bias, h.dtype))
        if projection.adapted:
            low, b = left.pop(0)
            y.addmm_(low, b.to(h.dtype).T, alpha=projection.scaling)
        outputs.append(y)
    return tuple(outputs)


def project_backward(
    h: Tensor, dys: Sequence[Tensor], projections: Sequence[Frozen], factors: Sequence[Tensor], needs_input: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """(dh or None, gradients of the factors in the order they were given)."""
    lows = _low(h, factors[::2])
    pairs = list(zip(lows, factors[::2], factors[1::2]))
    dh: Tensor | None = None
    gradients: list[Tensor] = []
    for projection, given in zip(projections, dys):
        dy = given if given.is_contiguous() else given.contiguous()
        if needs_input:
            w = projection.weight(h.dtype)
            dh = dy @ w if dh is None else dh.addmm_(dy, w)
            del w
        if projection.adapted:
            low, a, b = pairs.pop(0)
            u = (dy @ b.to(h.dtype)).mul_(projection.scaling)
            gradients += [(u.T @ h).to(a.dtype), (low.T @ dy).T.to(b.dtype).mul_(projection.scaling)]
            if dh is not None:
                dh.addmm_(u, a.to(h.dtype))
    return dh, gradients


def _low(h: Tensor, lora_as: Sequence[Tensor]) -> Sequence[Tensor]:
    """x A^T of every projection, as one product."""
    if not lora_as:
        return ()
    if len(lora_as) == 1:
        return (linear(h, lora_as[0].to(h.dtype)),)
    return linear(h, torch.cat([a.to(h.dtype) for a in lora_as])).split([a.shape[0] for a in lora_as], dim=1)


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
