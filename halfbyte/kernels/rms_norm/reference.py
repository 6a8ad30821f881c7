"""The specification of rms_norm in plain PyTorch; see the package for the formulas."""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """x (..., H) -> (y (..., H), rstd (...))."""
    wide, w = _wide(x), _wide(weight)
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    n = wide * rstd[..., None]
    y = w * _wide(n.to(x.dtype)) if form == 0 else w * n if form == 1 else n * (1 + w)
    return y.to(x.dtype), rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (..., H) -> (their sum, y of it, rstd (...))."""
    summed = x + residual
    return summed, *rms_norm(summed, weight, eps, form)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: int, extra: Tensor | None = None) -> Tensor:
    """dx (..., H)."""
    n = _wide(x) * rstd[..., None]
    g = _wide(dy) * (1 + _wide(weight) if form == 2 else _wide(weight))
    dx = rstd[..., None] * (g - n * (g * n).mean(dim=-1, keepdim=True))
    return (dx if extra is None else dx + _wide(extra)).to(x.dtype)


def rms_norm_weight_grad(dy: Tensor, x: Tensor, rstd: Tensor, form: int) -> Tensor:
    """dw (H,)."""
    n = _wide(x) * rstd[..., None]
    n = _wide(n.to(x.dtype)) if form == 0 else n
    return (_wide(dy) * n).reshape(-1, x.shape[-1]).sum(dim=0)
