"""The specification of gated_mlp in plain PyTorch; see the package for the formulas."""

import math

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _act(g: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """(act(g), its derivative), of wide numbers."""
    if act == "gelu":
        below = torch.special.ndtr(g)
        return g * below, below + g * torch.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    c = 2 * math.sqrt(2 / math.pi)
    twice, slope = (g, 1.0) if act == "silu" else (c * (g + 0.044715 * g**3), c * (1 + 3 * 0.044715 * g * g))
    s = torch.sigmoid(twice)
    return g * s, s + g * s * (1 - s) * slope


def gated_act(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up (..., I) -> h (..., I)."""
    return (_act(_wide(gate), act)[0] * _wide(up)).to(gate.dtype)


def gated_act_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup), each (..., I)."""
    value, slope = _act(_wide(gate), act)
    h, dgate, dup = value * _wide(up), _wide(dh) * _wide(up) * slope, _wide(dh) * value
    return h.to(gate.dtype), dgate.to(gate.dtype), dup.to(gate.dtype)
