"""rope: rotary position embedding, out of place and in place; its gradient is the transposed rotation.

    the first R of D columns turn, the rest passes through; column j < R/2 turns with column j + R/2
    y_j       = x_j cos_j           - x_{j+R/2} sin_j
    y_{j+R/2} = x_{j+R/2} cos_{j+R/2} + x_j sin_{j+R/2}
    inverse:  the transpose, dx_j = dy_j cos_j + dy_{j+R/2} sin_{j+R/2},  dx_{j+R/2} = dy_{j+R/2} cos_{j+R/2} - dy_j sin_j

This is transformers' layout (`rotate_half`), whose tables hold each half twice.  fp32 inside, one rounding; float64 stays float64.
x may be a slice of a fused projection: rows need not lie side by side, the D numbers of a head must.  cos and sin are no inputs of
the gradient.

Source: https://arxiv.org/abs/2104.09864 (RoFormer)
Shapes: x (T, H, D), cos and sin (T, R), R even and at most D -> (T, H, D)
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "rope"
LIBRARY.define("rope(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor")
LIBRARY.define("rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse=False) -> ()")


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (tokens, heads, width) of floating-point numbers, found {x.dtype} of shape {tuple(x.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != x.shape[0] or cos.shape[1] > x.shape[2] or cos.shape[1] % 2:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit x {tuple(x.shape)}")


def _forward(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    check(x, cos, sin)
    return listing.implementation(OP, x).rope(x, cos, sin, inverse)


def _forward_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    check(x, cos, sin)
    listing.implementation(OP, x).rope_(x, cos, sin, inverse)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.halfbyte.rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


LIBRARY.impl("rope", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("rope_", _forward_, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::rope", lambda x, cos, sin, inverse=False: x.new_empty(x.shape), lib=LIBRARY)
torch.library.register_fake("halfbyte::rope_", lambda x, cos, sin, inverse=False: None, lib=LIBRARY)
torch.library.register_autograd("halfbyte::rope", _backward, setup_context=_keep, lib=LIBRARY)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """(T, H, D) turned, contiguous; differentiable in x.  Raises ValueError on shapes that do not fit."""
    return torch.ops.halfbyte.rope(x, cos, sin, inverse)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x itself, turned in place; not differentiable.  Raises ValueError on shapes that do not fit."""
    torch.ops.halfbyte.rope_(x, cos, sin, inverse)
    return x
