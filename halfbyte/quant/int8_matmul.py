"""Activations times a frozen int8 weight in rows (LLM.int8()), differentiable in the activations only.

    y = x @ (int8 * rowmax * (1/127)).T      the weight dequantized in fp32, rounded to the dtype it had, cast to x's

Activations stay in floating point: the int8 x int8 product with its outlier columns is an inference device and is not used here.

Source: https://arxiv.org/abs/2208.07339
"""

from typing import Any

import torch
from torch import Tensor


def dense_rows(stored_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, I) of `dtype`: (int8 * rowmax) * (1/127) in fp32 in this order, then rounded to `dtype`."""
    return (stored_OI.float().mul_(absmax_O[:, None]).mul_(1 / 127)).to(dtype)


class _MatmulInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(stored, absmax)
        ctx.dtype = dtype
        return torch.nn.functional.linear(x, dense_rows(stored, absmax, dtype).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = upstream
        stored, absmax = ctx.saved_tensors
        return dy @ dense_rows(stored, absmax, ctx.dtype).to(dy.dtype), None, None, None


def matmul_int8(x: Tensor, stored_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype.  Raises ValueError where x does not fit or is not floating point."""
    if not x.is_floating_point() or x.shape[-1] != stored_OI.shape[1]:
        raise ValueError(f"activations {x.dtype} {tuple(x.shape)} do not fit a weight of shape {tuple(stored_OI.shape)}")
    return _MatmulInt8.apply(x, stored_OI, absmax_O, dtype)
