"""matmul_4bit: activations times a frozen blockwise-quantized weight.

    W_OI   = dequantize(packed)                    in `dtype`, the type the weight had before quantization, then cast to x's
    y_BO   = x_BI @ W_OI.T
    dx_BI  = dy_BO @ W_OI                          W is dequantized again; there is no gradient for anything else

Between forward and backward only the packed bytes, the scales and the codebook are alive: that is QLoRA's memory.  With up to four rows
of x (decoding) the CPU multiplies the bytes as it reads them and makes nothing dense.

Source: https://arxiv.org/abs/2305.14314 (QLoRA, equation 5)
Shapes: x (..., I); packed, absmax, codebook, nested as in dequantize_blockwise for the n = O * I elements of `shape` = (O, I) -> (..., O)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.dequantize_blockwise import Nested, nested_of
from halfbyte.kernels.dequantize_blockwise import check as check_stored
from halfbyte.kernels.library import LIBRARY

OP = "matmul_4bit"
_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor codebook, int blocksize, int[] shape, ScalarType dtype,"
    " Tensor? absmax2=None, Tensor? nested_codebook=None, Tensor? offset=None"
)
LIBRARY.define(f"matmul_4bit(Tensor x, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"matmul_4bit_input_gradient(Tensor dy, {_WEIGHT}) -> Tensor")


def check(x: Tensor, shape: Sequence[int], axis: int = 1) -> None:
    """Raise ValueError where the activation cannot meet the weight."""
    if not x.is_floating_point():
        raise ValueError(f"activations must be floating point, found {x.dtype}: the dtype of packed bytes is not a compute dtype")
    if len(shape) != 2 or x.shape[-1] != shape[axis]:
        raise ValueError(f"activations of shape {tuple(x.shape)} do not fit a weight of shape {tuple(shape)}")


def _serve(
    x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    absmax2: Tensor | None = None, nested_codebook: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check(x, shape)
    nested = nested_of(absmax2, nested_codebook, offset)
    check_stored(packed, absmax, codebook, blocksize, shape[0] * shape[1], nested)
    return listing.implementation(OP, x).matmul_4bit(x, packed, absmax, codebook, blocksize, shape, dtype, nested)


def _serve_gradient(
    dy: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    absmax2: Tensor | None = None, nested_codebook: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check(dy, shape, axis=0)
    nested = nested_of(absmax2, nested_codebook, offset)
    return listing.implementation(OP, dy).input_gradient(dy, packed, absmax, codebook, blocksize, shape, dtype, nested)


def _fake(x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: list[int], *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _fake_gradient(dy: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: list[int], *rest: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, codebook, ctx.blocksize, ctx.shape, ctx.dtype, *nested = inputs
    ctx.save_for_backward(packed, absmax, codebook, *nested)


def _backward_through(name: str) -> Any:
    """The backward of each of the two products is the other one, so gradients of gradients are right as well."""

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            packed, absmax, codebook, *nested = ctx.saved_tensors
            op = getattr(torch.ops.halfbyte, name)
            dx = op(dy, packed, absmax, codebook, ctx.blocksize, ctx.shape, ctx.dtype, *nested)
        return (dx, *(None,) * 9)

    return backward


for _name, _function, _shape, _other in (
    ("matmul_4bit", _serve, _fake, "matmul_4bit_input_gradient"),
    ("matmul_4bit_input_gradient", _serve_gradient, _fake_gradient, "matmul_4bit"),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"halfbyte::{_name}", _shape, lib=LIBRARY)
    torch.library.register_autograd(f"halfbyte::{_name}", _backward_through(_other), setup_context=_keep, lib=LIBRARY)


class _Product(torch.autograd.Function):
    """The op without the dispatcher: `product` forward and `other` backward, each the backward of the other.

    The weight is kept as it is, not as a saved tensor: it is frozen, and a hook that moves saved tensors to the host would move it too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Any, other: Any, weight: tuple[Any, ...]) -> Tensor:
        ctx.product, ctx.other, ctx.weight = product, other, weight
        return product(x, *weight)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # somebody wants the gradient of this gradient
            return _Product.apply(dys[0], ctx.other, ctx.product, ctx.weight), None, None, None
        return ctx.other(dys[0], *ctx.weight), None, None, None


def matmul_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: tuple[int, int], dtype: torch.dtype,
    nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """(..., O) of x's dtype; differentiable in x only.  Raises ValueError where x does not fit or is not floating point."""
    if type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        # the way through the dispatcher takes a good part of what a small product takes
        weight = (packed, absmax, codebook, blocksize, shape, dtype, *(nested or ()))
        return _Product.apply(x, _serve, _serve_gradient, weight) if torch.is_grad_enabled() and x.requires_grad else _serve(x, *weight)
    return torch.ops.halfbyte.matmul_4bit(x, packed, absmax, codebook, blocksize, shape, dtype, *(nested or ()))


def matmuls_4bit(x: Tensor, weights: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """x (..., I) times each of several weights, given as the other arguments of `matmul_4bit`; not differentiable.

    Four rows at most on the CPU are brought into the kernel's order once for all of them.  Raises as `matmul_4bit` does.
    """
    for packed, absmax, codebook, blocksize, shape, _, nested in weights:
        check(x, shape)
        check_stored(packed, absmax, codebook, blocksize, shape[0] * shape[1], nested)
    module = listing.implementation(OP, x)
    if hasattr(module, "matmuls_4bit"):
        made: list[Tensor] = module.matmuls_4bit(x, weights)
        return made
    return [module.matmul_4bit(x, *weight) for weight in weights]
