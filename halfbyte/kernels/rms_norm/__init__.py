"""rms_norm: root-mean-square normalisation, alone or of a sum, and its gradients.

    r     = 1 / sqrt(mean_h(x_h^2) + eps)          one number per row, fp32, kept for the backward
    n     = x r
    y     = w cast(n)          form 0, Llama       cast rounds to the type of x, once more after the product
          = cast(w n)          form 1, OLMo 2
          = cast(n (1 + w))    form 2, Gemma
    add_rms_norm:  s = cast(x + residual), then the same of the rounded s

    dx    = r (g - n mean_h(g n)) + extra,  g = dy w        (form 2: dy (1 + w)); rounded once, after `extra` is added
    dw    = sum_t dy n                                      (form 0: of the rounded n)

The backward of add_rms_norm hands the gradient of s in as `extra`, so that the sum of both costs no pass of its own.  All sums are fp32;
float64 stays float64.  The result has the type of x whatever the weight's.

Source: https://arxiv.org/abs/1910.07467; the three forms are those of transformers' models
Shapes: x, residual, extra (..., H), weight (H,) -> y, s, dx (..., H), rstd (...) fp32, dw (H,) fp32
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "rms_norm"
LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps, int form) -> (Tensor, Tensor)")
LIBRARY.define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int form) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, int form, Tensor? extra=None) -> Tensor")
LIBRARY.define("rms_norm_weight_grad(Tensor dy, Tensor x, Tensor rstd, int form) -> Tensor")


def check(x: Tensor, weight: Tensor | None, form: int, *same: Tensor | None) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if form not in (0, 1, 2):
        raise ValueError(f"form is 0, 1 or 2, found {form}")
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"rows of floating-point numbers are normalised, found {x.dtype} of shape {tuple(x.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not fit rows of {x.shape[-1]}")
    for other in same:
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise ValueError(f"{other.dtype} of shape {tuple(other.shape)} does not fit {x.dtype} of shape {tuple(x.shape)}")


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(x: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    check(x, weight, form)
    return listing.implementation(OP, x).rms_norm(x, weight, eps, form)


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight, form, residual)
    return listing.implementation(OP, x).add_rms_norm(x, residual, weight, eps, form)


def _dx(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: int, extra: Tensor | None = None) -> Tensor:
    check(x, weight, form, dy, extra)
    return listing.implementation(OP, x).rms_norm_backward(dy, x, weight, rstd, form, extra)


def _dw(dy: Tensor, x: Tensor, rstd: Tensor, form: int) -> Tensor:
    check(x, None, form, dy)
    return listing.implementation(OP, x).rms_norm_weight_grad(dy, x, rstd, form)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rstd_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=_exact(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.form = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx = torch.ops.halfbyte.rms_norm_backward(dy, x, weight, rstd, ctx.form) if needs_x else None
    dw = torch.ops.halfbyte.rms_norm_weight_grad(dy, x, rstd, ctx.form).to(weight.dtype) if needs_weight else None
    return dx, dw, None, None


def _keep_added(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, weight, _, ctx.form = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[0], weight, output[2])


def _backward_added(ctx: Any, d_summed: Tensor, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    summed, weight, rstd = ctx.saved_tensors
    needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
    dx = torch.ops.halfbyte.rms_norm_backward(dy, summed, weight, rstd, ctx.form, d_summed) if needs_x or needs_residual else None
    dw = torch.ops.halfbyte.rms_norm_weight_grad(dy, summed, rstd, ctx.form).to(weight.dtype) if needs_weight else None
    return dx if needs_x else None, dx if needs_residual else None, dw, None, None


for _name, _serve in (("rms_norm", _forward), ("add_rms_norm", _add_forward), ("rms_norm_backward", _dx), ("rms_norm_weight_grad", _dw)):
    LIBRARY.impl(_name, _serve, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::rms_norm", lambda x, weight, eps, form: (_like(x), _rstd_like(x)), lib=LIBRARY)
torch.library.register_fake(
    "halfbyte::add_rms_norm", lambda x, residual, weight, eps, form: (_like(x), _like(x), _rstd_like(x)), lib=LIBRARY
)
torch.library.register_fake("halfbyte::rms_norm_backward", lambda dy, x, weight, rstd, form, extra=None: _like(x), lib=LIBRARY)
torch.library.register_fake(
    "halfbyte::rms_norm_weight_grad", lambda dy, x, rstd, form: x.new_empty(x.shape[-1:], dtype=_exact(x)), lib=LIBRARY
)
torch.library.register_autograd("halfbyte::rms_norm", _backward, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd("halfbyte::add_rms_norm", _backward_added, setup_context=_keep_added, lib=LIBRARY)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """(y (..., H) of x's dtype, rstd (...) fp32); differentiable in x and weight.  Raises ValueError on arguments that do not fit."""
    return torch.ops.halfbyte.rms_norm(x, weight, eps, form)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """(s = x + residual, y of s, rstd); differentiable in x, residual and weight.  Raises ValueError on arguments that do not fit."""
    return torch.ops.halfbyte.add_rms_norm(x, residual, weight, eps, form)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: int, extra: Tensor | None = None) -> Tensor:
    """dx (..., H) of x's dtype, with `extra` (..., H) added before the one rounding."""
    return torch.ops.halfbyte.rms_norm_backward(dy, x, weight, rstd, form, extra)


def rms_norm_weight_grad(dy: Tensor, x: Tensor, rstd: Tensor, form: int) -> Tensor:
    """dw (H,) fp32."""
    return torch.ops.halfbyte.rms_norm_weight_grad(dy, x, rstd, form)
