"""The dense weight of any layer that acts as a linear map, and a dense layer of the same kind with another weight.

One generic function instead of a class per combination: whatever `dense_weight` knows can be adapted, merged and measured.

| layer | weight is kept as |
|---|---|
| nn.Linear (and subclasses that keep its forward) | (out, in) |
| transformers' Conv1D (GPT-2) | (in, out) |
| QuantLinear | packed bytes |
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from halfbyte.errors import UnsupportedError
from halfbyte.quant.linear import QuantLinear


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D, known by its qualified name so that transformers need not be imported."""
    return any(kind.__module__ == "transformers.pytorch_utils" and kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def is_linear_like(module: nn.Module) -> bool:
    """True where `dense_weight` serves.

    A subclass of nn.Linear counts only if it keeps nn.Linear's forward and a floating-point matrix; the output projection inside
    nn.MultiheadAttention does not, for its owner reads the raw weight past any layer put in its place.
    """
    if isinstance(module, QuantLinear) or is_conv1d(module):
        return True
    return (
        isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
        and type(module).forward is nn.Linear.forward and module.weight.is_floating_point() and module.weight.dim() == 2
    )  # fmt: skip


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear-like layer.  Raises UnsupportedError on any other."""
    _require(layer)
    if isinstance(layer, (nn.Linear, QuantLinear)):
        return layer.out_features, layer.in_features
    weight = layer.get_parameter("weight")
    return weight.shape[1], weight.shape[0]


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """(out, in) the weight the layer acts with, detached, in `dtype` (default: as kept, or as it was before quantization).

    It may share memory with the layer: do not write into it.  Raises UnsupportedError on a layer that is not linear-like.
    """
    _require(layer)
    if isinstance(layer, QuantLinear):
        return layer.dequantize(dtype)
    weight = layer.get_parameter("weight").detach()
    weight = weight if isinstance(layer, nn.Linear) else weight.T
    return weight if dtype is None else weight.to(dtype)


def with_weight(layer: nn.Module, weight_OI: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A new dense layer of the same kind with this weight and bias: Conv1D for Conv1D, else nn.Linear; never a packed one.

    A Conv1D without bias gets zeros.  Gradients are asked for where the old layer asked for them.
    """
    rows, columns = weight_OI.shape
    trains = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    new: nn.Module
    if is_conv1d(layer):
        kind = next(kind for kind in type(layer).__mro__ if kind.__name__ == "Conv1D")
        with torch.device("meta"):
            new = kind(rows, columns)
        new.weight = nn.Parameter(weight_OI.T.contiguous(), requires_grad=trains)
        bias = weight_OI.new_zeros(rows) if bias is None else bias
    else:
        _require(layer)
        new = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        new.weight = nn.Parameter(weight_OI.contiguous(), requires_grad=trains)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=trains)
    return new.train(layer.training)


def _require(layer: nn.Module) -> None:
    if not is_linear_like(layer):
        raise UnsupportedError(
            "only layers that act as a linear map have a dense weight", code="E-UNSUP-003", found=type(layer).__qualname__,
            expected="nn.Linear, Conv1D, QuantLinear",
        )
