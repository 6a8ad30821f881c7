"""gated_mlp: the element-wise part of a gated MLP, forward and backward, each in one pass.

    h      = act(gate) up
    dup    = dh act(gate)          dgate = dh up act'(gate)          and h once more, for the gradient of the down projection

    silu       act(g) = g s,  s = 1 / (1 + e^-g)                     act'(g) = s (1 + g (1 - s))
    gelu_tanh  act(g) = g s,  s of 2 u,  u = sqrt(2/pi) (g + 0.044715 g^3)   since (1 + tanh u) / 2 = s(2 u);  act' = s + g s (1 - s) 2 u'
    gelu       act(g) = g P(g),  P the normal distribution           act'(g) = P(g) + g e^(-g^2/2) / sqrt(2 pi)

fp32 inside, one rounding at the end; float64 stays float64.  Only gate and up are kept for the backward.

Source: https://arxiv.org/abs/2002.05202 (GLU variants), https://arxiv.org/abs/1606.08415 (GELU)
Shapes: gate, up, dh, h, dgate, dup all (..., I) of one dtype; gate and up may be slices of one wider tensor
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "gated_mlp"
ACTS = ("silu", "gelu_tanh", "gelu")
LIBRARY.define("gated_act(Tensor gate, Tensor up, str act) -> Tensor")
LIBRARY.define("gated_act_backward(Tensor dh, Tensor gate, Tensor up, str act) -> (Tensor, Tensor, Tensor)")


def check(act: str, gate: Tensor, *others: Tensor) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if act not in ACTS:
        raise ValueError(f"act is one of {', '.join(ACTS)}, found {act}")
    if not gate.is_floating_point() or gate.dim() < 1:
        raise ValueError(f"gate must be rows of floating-point numbers, found {gate.dtype} of shape {tuple(gate.shape)}")
    for other in others:
        if other.shape != gate.shape or other.dtype != gate.dtype:
            raise ValueError(f"{other.dtype} of shape {tuple(other.shape)} does not fit {gate.dtype} of shape {tuple(gate.shape)}")


def _forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    check(act, gate, up)
    return listing.implementation(OP, gate).gated_act(gate, up, act)


def _gradients(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    check(act, gate, up, dh)
    return listing.implementation(OP, gate).gated_act_backward(dh, gate, up, act)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    _, dgate, dup = torch.ops.halfbyte.gated_act_backward(dh, gate, up, ctx.act)
    return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None, None


LIBRARY.impl("gated_act", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("gated_act_backward", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::gated_act", lambda gate, up, act: _like(gate), lib=LIBRARY)
torch.library.register_fake(
    "halfbyte::gated_act_backward", lambda dh, gate, up, act: (_like(gate), _like(gate), _like(gate)), lib=LIBRARY
)
torch.library.register_autograd("halfbyte::gated_act", _backward, setup_context=_keep, lib=LIBRARY)


def gated_act(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """h (..., I) = act(gate) * up; differentiable in both.  Raises ValueError on arguments that do not fit."""
    return torch.ops.halfbyte.gated_act(gate, up, act)


def gated_act_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup), each (..., I).  Raises ValueError on arguments that do not fit."""
    return torch.ops.halfbyte.gated_act_backward(dh, gate, up, act)
