"""matmul_4bit: activations times a frozen blockwise-quantized weight.

    W_OI   = dequantize(packed)                    in `dtype`, the type the weight had before quantization, then cast to x's
    y_BO   = x_BI @ W_OI.T
    dx_BI  = dy_BO @ W_OI                          W is dequantized again; there is no gradient for anything else

Between forward and backward only the packed bytes, the scales and the codebook are alive: that is QLoRA's memory.

Source: https://arxiv.org/abs/2305.14314 (QLoRA, equation 5)
Shapes: x (..., I); packed, absmax, codebook as in dequantize_blockwise for the n = O * I elements of `shape` = (O, I) -> (..., O)
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise
from halfbyte.kernels.library import LIBRARY
from halfbyte.kernels.matmul_4bit import reference

LIBRARY.define(
    "matmul_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor codebook, int blocksize, int[] shape, ScalarType dtype) -> Tensor"
)


def check(x: Tensor, shape: list[int] | tuple[int, ...]) -> None:
    """Raise ValueError where the activation cannot meet the weight."""
    if not x.is_floating_point():
        raise ValueError(f"activations must be floating point, found {x.dtype}: the dtype of packed bytes is not a compute dtype")
    if len(shape) != 2 or x.shape[-1] != shape[1]:
        raise ValueError(f"activations of shape {tuple(x.shape)} do not fit a weight of shape {tuple(shape)}")


def _serve(x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    check(x, shape)
    listing.chosen("matmul_4bit", x.device.type)
    return reference.matmul_4bit(x, packed, absmax, codebook, blocksize, shape, dtype)


def _fake(x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, codebook, ctx.blocksize, ctx.shape, ctx.dtype = inputs
    ctx.save_for_backward(packed, absmax, codebook)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 7
    packed, absmax, codebook = ctx.saved_tensors
    rows, columns = ctx.shape
    weight = dequantize_blockwise(packed, absmax, codebook, ctx.blocksize, rows * columns, ctx.dtype).view(rows, columns)
    return dy @ weight.to(dy.dtype), None, None, None, None, None, None


LIBRARY.impl("matmul_4bit", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::matmul_4bit", _fake, lib=LIBRARY)
torch.library.register_autograd("halfbyte::matmul_4bit", _backward, setup_context=_keep, lib=LIBRARY)


def matmul_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(..., O) of x's dtype; differentiable in x only.  Raises ValueError where x does not fit or is not floating point."""
    return torch.ops.halfbyte.matmul_4bit(x, packed, absmax, codebook, blocksize, shape, dtype)
