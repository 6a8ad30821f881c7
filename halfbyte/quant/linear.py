"""QuantLinear: a frozen packed weight that acts as nn.Linear.

The bytes are held in the buffer `weight` (uint8 (ceil(n/2), 1) for nf4 and fp4, int8 (out, in) for int8), beside it what the state
needs: `absmax`, `codebook` and, with double quantization, `absmax2`, `nested_codebook`, `offset`.  All are buffers, so they move, copy,
save and load with the module; none ever changes its dtype, whatever `to(dtype)` is asked of the model around it.

    forward:   y = x @ dequantize(weight).T + bias     the weight in the dtype it had, then cast to the compute dtype
    backward:  dx only; nothing dense is alive between the two

The compute dtype is a field: None means the dtype of x, or autocast's.  It is never read from the bytes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.matmul_4bit import matmul_4bit
from halfbyte.quant import blockwise
from halfbyte.quant.codebooks import CODEBOOKS
from halfbyte.quant.int8_matmul import matmul_int8
from halfbyte.quant.quant_state import FORMATS, NESTED_BLOCKSIZE, Nested, QuantState

STATE_BUFFERS = ("weight", "absmax", "codebook", "absmax2", "nested_codebook", "offset")


def keep_dtypes(module: nn.Module, names: Iterable[str], fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of a module's `_apply`, but a buffer of `module` named in `names` keeps its dtype and takes only the new device.

    A scale rounded to bfloat16 moves every weight of its block, and packed bytes read as floats are noise.
    """
    held = {id(tensor) for name in names if (tensor := module._buffers.get(name)) is not None}

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if id(tensor) in held and moved.dtype != tensor.dtype else moved

    return keep


class QuantLinear(nn.Module):
    """A linear layer (out, in) whose weight is packed.  Made by `from_linear` or, without values, by `empty`."""

    weight: Tensor
    absmax: Tensor
    codebook: Tensor
    absmax2: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, stored: Tensor, state: QuantState, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if len(state.shape) != 2:
            raise ValueError(f"a linear layer has a weight of two dimensions, found {state.shape}")
        self.out_features, self.in_features = state.shape
        self.format, self.blocksize, self.dtype = state.format, state.blocksize, state.dtype
        self.compute_dtype = compute_dtype
        self.register_buffer("weight", stored if state.format == "int8" else stored.reshape(-1, 1))
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("codebook", state.codebook if state.format != "int8" else None)
        self.register_buffer("absmax2", state.nested.absmax2 if state.nested else None)
        self.register_buffer("nested_codebook", state.nested.codebook if state.nested else None)
        self.register_buffer("offset", state.nested.offset if state.nested else None)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, name: str = ""
    ) -> "QuantLinear":
        """Quantize the weight of `linear`; its bias is shared, not copied.  Raises as `blockwise.quantize` does."""
        stored, state = blockwise.quantize(linear.weight, format, blocksize, double_quant, name)
        made = cls(stored, state)
        made.bias = linear.bias
        return made.train(linear.training)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool = False, format: str = "nf4", blocksize: int = 64, double_quant: bool = True,
        dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None, device: str | torch.device = "meta",
    ) -> "QuantLinear":  # fmt: skip
        """A layer with buffers of the right shapes and no values, to be filled by loading; codebooks are set off the meta device."""
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {format}")
        count, offset = in_features * out_features, torch.empty((), dtype=torch.float32, device=device)
        if format == "int8":
            stored = torch.empty((out_features, in_features), dtype=torch.int8, device=device)
            scales, codebook, nested = torch.empty(out_features, device=device), torch.empty(0, device=device), None
            blocksize = in_features
        else:
            stored = torch.empty((count + 1) // 2, dtype=torch.uint8, device=device)
            blocks = -(-count // blocksize)
            scales = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device)
            codebook = CODEBOOKS[format].clone().to(device)
            absmax2 = torch.empty(-(-blocks // NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
            nested = Nested(absmax2, CODEBOOKS["dynamic-signed"].clone().to(device), offset) if double_quant else None
        state = QuantState(format, codebook, scales.to(scales.dtype), blocksize, (out_features, in_features), dtype, nested)
        return cls(stored, state, torch.empty(out_features, dtype=dtype, device=device) if bias else None, compute_dtype)

    @property
    def packed(self) -> Tensor:
        """The stored bytes."""
        return self.weight

    @property
    def state(self) -> QuantState:
        """How the bytes are read; made from the buffers at each call, so it is always where they are."""
        nested = None if self._nested is None else Nested(*self._nested)
        codebook = self.codebook if self.codebook is not None else self.absmax.new_empty(0)
        return QuantState(self.format, codebook, self.absmax, self.blocksize, (self.out_features, self.in_features), self.dtype, nested)

    @property
    def _nested(self) -> tuple[Tensor, Tensor, Tensor] | None:
        absmax2, codebook, offset = self.absmax2, self.nested_codebook, self.offset
        return None if absmax2 is None or codebook is None or offset is None else (absmax2, codebook, offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) the dense weight in `dtype` (default: the dtype it had before)."""
        return blockwise.dequantize(self.weight, self.state, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype, or autocast's.  Raises ValueError where x is not floating point or does not fit."""
        arrived = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            arrived = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                return self._product(x.to(arrived)).to(arrived)
        return self._product(x).to(arrived)

    def _product(self, x: Tensor) -> Tensor:
        """(..., out) in the compute dtype, bias added."""
        if self.compute_dtype is not None and x.is_floating_point():
            x = x.to(self.compute_dtype)
        if self.format == "int8":
            y = matmul_int8(x, self.weight, self.absmax, self.dtype)
        else:
            y = matmul_4bit(x, *self.product_arguments())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product_arguments(self) -> tuple[Any, ...]:
        """What `matmul_4bit` wants besides x."""
        shape = (self.out_features, self.in_features)
        return self.weight.view(-1), self.absmax, self.codebook, self.blocksize, shape, self.dtype, self._nested

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves reach every buffer; casts reach only the bias."""
        return super()._apply(keep_dtypes(self, STATE_BUFFERS, fn), recurse)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.absmax2 is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.format}{double}"
