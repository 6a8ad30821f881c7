"""Mixtures of experts whose weights are one fused tensor: the forward, shared by dense, packed and adapted experts, and the packed ones.

A fused parameter is (E, O, I), or (E, I, O) where the module says `is_transposed`.  Everything goes through one callable

    project(name, x_TI, expert) -> (T, O)          name is "gate_up_proj", "up_proj" or "down_proj"; without the bias

so that a low-rank update is `project` plus its own product, and nothing about routing, gates or biases is written twice:

    h = gate(project("gate_up_proj", x, e) + bias_e);   y += routing_weight * (project("down_proj", h, e) + bias_e)

The gate is the stock module's own `_apply_gate`.  Packed experts keep every expert's (O, I) slice as a tensor of its own, quantized on
its own; only the experts that tokens reach are dequantized, one at a time, in forward and again in backward.

Source: https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/moe.py
Shapes: hidden (T, H); top_k_index, top_k_weights (T, K); E experts
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.matmul_4bit import matmul_4bit
from halfbyte.quant import blockwise
from halfbyte.quant.codebooks import CODEBOOKS
from halfbyte.quant.int8_matmul import matmul_int8
from halfbyte.quant.linear import keep_dtypes
from halfbyte.quant.quant_state import FORMATS, NESTED_BLOCKSIZE, Nested, QuantState

Project = Callable[[str, Tensor, int], Tensor]
NAMES = ("gate_up_proj", "up_proj", "down_proj")
_MARKS = ("has_gate", "has_bias", "is_transposed")  # set by transformers on every experts class of this structure


def is_experts(module: nn.Module) -> bool:
    """True for a stock module of fused experts that `experts_forward` reproduces, and for QuantExperts."""
    if isinstance(module, QuantExperts):
        return True
    own = dict(module.named_parameters(recurse=False))
    fused = {name for name, parameter in own.items() if parameter.dim() == 3}
    return (
        all(hasattr(module, mark) for mark in _MARKS) and isinstance(getattr(module, "num_experts", None), int)
        and fused == {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    )  # fmt: skip


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """name -> (E, O, I) of the fused weights of dense or packed experts, in definition order; empty for any other module."""
    if isinstance(module, QuantExperts):
        return dict(module.shapes)
    if not is_experts(module):
        return {}
    shapes = {name: tuple(own.shape) for name, own in module.named_parameters(recurse=False) if own.dim() == 3}
    return {name: (e, b, a) if module.is_transposed else (e, a, b) for name, (e, a, b) in shapes.items()}


def dense_expert(module: nn.Module, name: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
    """(O, I) the dense weight of one expert, detached; it may share memory with the module."""
    if isinstance(module, QuantExperts):
        return module.dequantize(name, expert, dtype)
    weight = module.get_parameter(name).detach()[expert]
    weight = weight.T if module.is_transposed else weight
    return weight if dtype is None else weight.to(dtype)


def projection(module: nn.Module) -> Project:
    """The product with the weights of dense or packed experts.  Raises UnsupportedError on any other module."""
    if isinstance(module, QuantExperts):
        return module.project
    if not is_experts(module):
        raise UnsupportedError(
            "fused experts have the structure that transformers marks them with", code="E-UNSUP-004", found=type(module).__qualname__,
            expected="num_experts, gate_up_proj or up_proj, down_proj as 3-D parameters",
        )

    def project(name: str, x: Tensor, expert: int) -> Tensor:
        weight = module.get_parameter(name)[expert]
        return torch.nn.functional.linear(x, weight.T if module.is_transposed else weight)

    return project


def experts_forward(
    experts: Any, project: Project, hidden_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> Tensor:
    """(T, H) the stock experts' output with `project` in the place of its weights; `experts` gives gate, activation and biases."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    output = torch.zeros_like(hidden_TH)
    for expert in torch.unique(top_k_index_TK).tolist():
        if expert >= experts.num_experts:  # the mark of a token that another process serves
            continue
        tokens, places = torch.where(top_k_index_TK == expert)
        inner = _with_bias(experts, first, project(first, hidden_TH[tokens], expert), expert)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        outer = _with_bias(experts, "down_proj", project("down_proj", inner, expert), expert)
        if getattr(experts, "has_post_expert_norm", False):
            outer = experts.post_expert_norm(outer)
        outer = outer * top_k_weights_TK[tokens, places, None]
        output.index_add_(0, tokens, outer.to(output.dtype))
    return output


def _with_bias(experts: Any, name: str, y: Tensor, expert: int) -> Tensor:
    return y + getattr(experts, f"{name}_bias")[expert].to(y.dtype) if experts.has_bias else y


class QuantExperts(nn.Module):
    """The experts of `stock` with packed weights; gate, activation, biases and plain settings are taken over under their own names.

    Buffers per fused parameter P: `P` (E, bytes) uint8 or (E, O, I) int8, `P_absmax` (E, N), with double quantization `P_absmax2` (E, M)
    and `P_offset` (E,); shared: `codebook`, `nested_codebook`.  None of them ever changes its dtype.
    """

    def __init__(
        self, stock: nn.Module, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, dtype: torch.dtype | None = None,
        device: str | torch.device = "meta",
    ) -> None:  # fmt: skip
        """Empty buffers on `device`, to be filled by `parts` and loading; `from_experts` quantizes what `stock` holds."""
        super().__init__()
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {format}")
        self.shapes = expert_shapes(stock)
        if not self.shapes:
            projection(stock)  # raises with the reason
        self.stock: Any = type(stock)
        for name, value in vars(stock).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in stock.named_children():
            self.add_module(name, child)
        for name, parameter in stock.named_parameters(recurse=False):
            if name not in self.shapes:
                self.register_parameter(name, parameter)
        self.format, self.blocksize, self.double_quant = format, blocksize, double_quant and format != "int8"
        self.dtype = dtype or stock.get_parameter("down_proj").dtype
        four = format != "int8"
        self.register_buffer("codebook", CODEBOOKS[format].clone().to(device) if four else None)
        self.register_buffer("nested_codebook", CODEBOOKS["dynamic-signed"].clone().to(device) if self.double_quant else None)
        self._held = ["codebook", "nested_codebook"]
        for name, (count, rows, columns) in self.shapes.items():
            for part, (shape, kind) in self._sizes(rows, columns).items():
                self.register_buffer(name + part, torch.empty((count, *shape), dtype=kind, device=device))
                self._held.append(name + part)
        self.train(stock.training)

    def _sizes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix -> (shape, dtype) of one expert's buffers."""
        if self.format == "int8":
            return {"": ((rows, columns), torch.int8), "_absmax": ((rows,), torch.float32)}
        blocks = -(-rows * columns // self.blocksize)
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "": (((rows * columns + 1) // 2,), torch.uint8),
            "_absmax": ((blocks,), torch.uint8 if self.double_quant else torch.float32),
        }
        if self.double_quant:
            sizes |= {"_absmax2": ((-(-blocks // NESTED_BLOCKSIZE),), torch.float32), "_offset": ((), torch.float32)}
        return sizes

    @classmethod
    def from_experts(
        cls, stock: nn.Module, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, name: str = ""
    ) -> "QuantExperts":
        """Quantize the fused weights of `stock`, one expert at a time.  Raises as `blockwise.quantize` does."""
        made = cls(stock, format, blocksize, double_quant, device=stock.get_parameter("down_proj").device)
        for parameter in made.shapes:
            place = f"{name}.{parameter}" if name else parameter
            for part, value in made.parts(parameter, stock.get_parameter(parameter), place).items():
                made.get_buffer(part).copy_(value)
        return made

    def parts(self, name: str, fused: Tensor, place: str = "") -> dict[str, Tensor]:
        """Buffer name -> value for a fused tensor as stored in the stock module, (E, O, I) or (E, I, O)."""
        count, rows, columns = self.shapes[name]
        places = [f"{place} expert {expert}" for expert in range(count)]
        if self.format != "int8" and not self.is_transposed and rows * columns % self.blocksize == 0:
            values = blockwise.quantize_stack(fused, self.format, self.blocksize, self.double_quant, places)
            parts = ("", "_absmax", "_absmax2", "_offset")
            return {name + part: value for part, value in zip(parts, values, strict=True) if value is not None}
        made = {
            name + part: torch.empty((count, *shape), dtype=kind, device=fused.device)
            for part, (shape, kind) in self._sizes(rows, columns).items()
        }
        for expert in range(count):
            weight = fused[expert].T if self.is_transposed else fused[expert]
            stored, state = blockwise.quantize(weight, self.format, self.blocksize, self.double_quant, places[expert])
            made[name][expert], made[name + "_absmax"][expert] = stored, state.absmax
            if state.nested is not None:
                made[name + "_absmax2"][expert], made[name + "_offset"][expert] = state.nested.absmax2, state.nested.offset
        return made

    def state(self, name: str, expert: int) -> QuantState:
        """How the bytes of one expert are read; tensors are views."""
        _, rows, columns = self.shapes[name]
        absmax = self.get_buffer(name + "_absmax")[expert]
        if self.format == "int8":
            return QuantState("int8", absmax.new_empty(0), absmax, columns, (rows, columns), self.dtype)
        nested = None
        if self.double_quant:
            absmax2, offset = self.get_buffer(name + "_absmax2")[expert], self.get_buffer(name + "_offset")[expert]
            nested = Nested(absmax2, self.get_buffer("nested_codebook"), offset)
        return QuantState(self.format, self.get_buffer("codebook"), absmax, self.blocksize, (rows, columns), self.dtype, nested)

    def dequantize(self, name: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """(O, I) the dense weight of one expert in `dtype` (default: the dtype it had before)."""
        return blockwise.dequantize(self.get_buffer(name)[expert], self.state(name, expert), dtype)

    def project(self, name: str, x: Tensor, expert: int) -> Tensor:
        """x (T, I) -> (T, O) in x's dtype, or autocast's; differentiable in x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        state, stored = self.state(name, expert), self.get_buffer(name)[expert]
        with torch.autocast(x.device.type, enabled=False):
            if self.format == "int8":
                return matmul_int8(x, stored, state.absmax, self.dtype)
            shape, nested = (state.shape[0], state.shape[1]), None if state.nested is None else state.nested.tensors
            return matmul_4bit(x, stored, state.absmax, state.codebook, self.blocksize, shape, self.dtype, nested)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """The stock module's gate, which reads its settings and activation from this module."""
        return self.stock._apply_gate(self, gate_up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden (T, H), index and weights (T, K) -> (T, H), as the stock module."""
        return experts_forward(self, self.project, hidden_states, top_k_index, top_k_weights)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves reach every buffer; casts reach biases and norms only."""
        return super()._apply(keep_dtypes(self, self._held, fn), recurse)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={shape}" for name, shape in self.shapes.items())
        return f"{shapes}, {self.format}{', double_quant' if self.double_quant else ''}"
