"""gemv: one row of activations times a dense frozen weight, what decoding a token asks of an output layer.

    y_O = W_OI x_I (+ bias_O)

Every element of W is used once, so reading it is the time it takes: 2 bytes an element in bfloat16.  The library's product is made for
many rows.  No gradient.

Source: https://netlib.org/blas (GEMV)
Shapes: x (1, I) or (I,), weight (O, I) of x's dtype, bias (O,) -> (1, O) or (O,); sums in float32
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "gemv"
LIBRARY.define("gemv(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if weight.dim() != 2 or x.numel() != weight.shape[1] or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"one row of {tuple(x.shape)} does not fit a weight of {tuple(weight.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x and weight must be of one floating-point type, found {x.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias of {tuple(bias.shape)} does not fit a weight of {tuple(weight.shape)}")


def _serve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check(x, weight, bias)
    return listing.implementation(OP, x).gemv(x, weight, bias)


LIBRARY.impl("gemv", _serve, "CompositeExplicitAutograd")
torch.library.register_fake(
    "halfbyte::gemv", lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])), lib=LIBRARY
)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., O) of x's dtype; not differentiable.  Raises ValueError on arguments that do not fit."""
    return torch.ops.halfbyte.gemv(x, weight, bias)
