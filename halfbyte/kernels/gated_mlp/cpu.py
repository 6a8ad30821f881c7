"""gated_mlp on the CPU: one pass over gate and up, everything in registers.

gelu's distribution is P(g) = 1 - q for g > 0, q else, with q = erfc(z) / 2, z = |g| / sqrt 2.  erfc(z) = e^(-z^2) t p(t) with
t = 1 / (1 + 0.3 z) and p of degree 8: the polynomial that comes within 4e-8 of erfc(z) e^(z^2) / t, relatively, for every z up to 14
(beyond, e^(-z^2) is 0 in float32); found by reweighted least squares, checked by a test.

float16 takes the reference: there are no instructions for it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.gated_mlp import ACTS, reference
from halfbyte.kernels.native import inline_fused, load, native, store
from halfbyte.kernels.rows import as_rows
from halfbyte.kernels.scalars import exp

_ONE, _HALF, _MINUS_HALF = np.float32(1), np.float32(0.5), np.float32(-0.5)
_TWICE, _CUBE, _THREE_CUBES = np.float32(1.5957691216057308), np.float32(0.044715), np.float32(0.134145)  # 2 sqrt(2/pi)
_INV_ROOT_TWO, _P = np.float32(0.7071067811865476), np.float32(0.3)
_DENSITY = np.float32(0.3989422804014327)  # 1 / sqrt(2 pi)
_0, _1, _2, _3, _4, _5, _6, _7, _8 = (
    np.float32(c / 2)
    for c in (
        0.1692047498033903, 0.1704237872916023, 0.1504683089243631, 0.2063876649654577, -0.07405589129275068, 0.5170599903979525,
        -0.4847028604916092, 0.4718322461271484, -0.1266179575311824,
    )
)  # fmt: skip


@inline_fused
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return _ONE / (_ONE + exp(-x))


@inline_fused
def _below(g):  # type: ignore[no-untyped-def]
    """(P(g), e^(-g^2/2))."""
    z = abs(g) * _INV_ROOT_TWO
    t = _ONE / (_ONE + _P * z)
    bell = exp(_MINUS_HALF * g * g)
    q = bell * t * (_0 + t * (_1 + t * (_2 + t * (_3 + t * (_4 + t * (_5 + t * (_6 + t * (_7 + t * _8))))))))
    return (_ONE - q if g > np.float32(0) else q), bell


@native("gate: T*, up: T*, h: T*, width: i64, gate_row: i64, up_row: i64, act: i64", T=("bf16", "f32"), apart=True)
def act_rows(gate: Any, up: Any, h: Any, width: int, gate_row: int, up_row: int, act: int, first: int, last: int) -> None:
    for row in range(first, last):
        a, b, c = row * gate_row, row * up_row, row * width
        if act == 0:
            for i in range(width):
                g = load(gate, a + i)
                store(h, c + i, g * _sigmoid(g) * load(up, b + i))
        elif act == 1:
            for i in range(width):
                g = load(gate, a + i)
                store(h, c + i, g * _sigmoid(_TWICE * (g + _CUBE * g * g * g)) * load(up, b + i))
        else:
            for i in range(width):
                g = load(gate, a + i)
                store(h, c + i, g * _below(g)[0] * load(up, b + i))


@native(
    "dh: T*, gate: T*, up: T*, h: T*, dgate: T*, dup: T*, width: i64, gate_row: i64, up_row: i64, act: i64",
    T=("bf16", "f32"), fast=True, apart=True,
)  # fmt: skip
def _backward(
    dh: Any, gate: Any, up: Any, h: Any, dgate: Any, dup: Any, width: int, gate_row: int, up_row: int, act: int, first: int, last: int
) -> None:  # fmt: skip
    for row in range(first, last):
        a, b, c = row * gate_row, row * up_row, row * width
        if act == 0:
            for i in range(width):
                g, u, d = load(gate, a + i), load(up, b + i), load(dh, c + i)
                s = _sigmoid(g)
                value = g * s
                store(h, c + i, value * u)
                store(dgate, c + i, d * u * (s + value * (_ONE - s)))
                store(dup, c + i, d * value)
        elif act == 1:
            for i in range(width):
                g, u, d = load(gate, a + i), load(up, b + i), load(dh, c + i)
                s = _sigmoid(_TWICE * (g + _CUBE * g * g * g))
                value = g * s
                store(h, c + i, value * u)
                store(dgate, c + i, d * u * (s + value * (_ONE - s) * (_TWICE * (_ONE + _THREE_CUBES * g * g))))
                store(dup, c + i, d * value)
        else:
            for i in range(width):
                g, u, d = load(gate, a + i), load(up, b + i), load(dh, c + i)
                below, bell = _below(g)
                value = g * below
                store(h, c + i, value * u)
                store(dgate, c + i, d * u * (below + g * bell * _DENSITY))
                store(dup, c + i, d * value)


def gated_act(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up (..., I) -> h (..., I)."""
    if gate.dtype == torch.float16:
        return reference.gated_act(gate, up, act)
    (gates, gate_row), (ups, up_row), width = as_rows(gate), as_rows(up), gate.shape[-1]
    h = gate.new_empty(gate.shape)
    if h.numel():
        act_rows(h.numel() // width, gates, ups, h, width, gate_row, up_row, ACTS.index(act), work=h.numel())
    return h


def gated_act_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup), each (..., I)."""
    if gate.dtype == torch.float16:
        return reference.gated_act_backward(dh, gate, up, act)
    (gates, gate_row), (ups, up_row), width = as_rows(gate), as_rows(up), gate.shape[-1]
    h, dgate, dup = (gate.new_empty(gate.shape) for _ in range(3))
    if h.numel():
        rows = h.numel() // width
        _backward(rows, dh.contiguous(), gates, ups, h, dgate, dup, width, gate_row, up_row, ACTS.index(act), work=h.numel())
    return h, dgate, dup
