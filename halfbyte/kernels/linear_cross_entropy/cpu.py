"""cross_entropy_ on the CPU: each row of logits is read once for its sum and once for its gradient, the second time from cache.

    for each block of columns:  m' = max(m, max_i v_i);   s = s e^(m - m') + sum_i e^(v_i - m')        v = scaled, capped logits
    loss = log s + m - v_label;   dz_i = e^(v_i - m) / s,  and - 1 for the label, before the one rounding

The maximum is taken over integers that are ordered as the floats are, which compiles to vector code and lets no NaN be lost.
float16 takes the reference: there are no instructions for it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.linear_cross_entropy import reference
from halfbyte.kernels.native import inline, inline_fused, load, native, store
from halfbyte.kernels.scalars import exp, exp_below

BLOCK = 512
"""Columns between two looks at the maximum: 2 KiB of float32, well inside the nearest cache."""

_ONE, _TWO = np.float32(1), np.float32(2)
_LOWEST = np.float32(-3.4e38)


@inline
def _key(x):  # type: ignore[no-untyped-def]
    """An int32 ordered as the float32 x is; its own inverse on the bits."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inline
def _unkey(key):  # type: ignore[no-untyped-def]
    return np.int32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@inline_fused
def _tanh(x):  # type: ignore[no-untyped-def]
    fall = exp(-_TWO * abs(x))
    size = (_ONE - fall) / (_ONE + fall)
    return -size if x < np.float32(0) else size


@inline
def _loss(total, top, value):  # type: ignore[no-untyped-def]
    """Here the order matters, which a fast kernel would not keep: top and value are large and nearly equal where a row is certain."""
    return np.log(total) + (top - value)


@native(
    "z: T*, labels: i64*, losses: f32*, columns: i64, scale: f32, cap: f32, gradient: i64", T=("bf16", "f32"), fast=True, apart=True
)
def _rows(
    z: Any, labels: Any, losses: Any, columns: int, scale: float, cap: float, gradient: int, first: int, last: int
) -> None:  # fmt: skip
    """Rows first..last; cap 0: none."""
    shrink = scale / cap if cap > 0 else np.float32(0)
    for row in range(first, last):
        at = row * columns
        high = _key(_LOWEST)
        top, total = _LOWEST, np.float32(0)
        for begin in range(at, at + columns, BLOCK):
            size = min(BLOCK, at + columns - begin)
            before = high
            for i in range(size):
                high = max(high, _key(load(z, begin + i) * scale))
            if high != before:
                seen = _unkey(high)
                seen = cap * _tanh(seen / cap) if cap > 0 else seen
                total *= exp(top - seen)
                top = seen
            part = np.float32(0)
            if cap > 0:
                for i in range(size):
                    part += exp_below(cap * _tanh(load(z, begin + i) * shrink) - top)
            else:
                for i in range(size):
                    part += exp_below(load(z, begin + i) * scale - top)
            total += part
        true = load(z, at + labels[row])
        bend = _tanh(true * shrink) if cap > 0 else np.float32(0)
        value = cap * bend if cap > 0 else true * scale
        losses[row] = _loss(total, top, value)
        if gradient:
            share = _ONE / total
            factor = share * scale
            if cap > 0:
                for i in range(columns):
                    t = _tanh(load(z, at + i) * shrink)
                    store(z, at + i, exp_below(cap * t - top) * (_ONE - t * t) * factor)
            else:
                for i in range(columns):
                    store(z, at + i, exp_below(load(z, at + i) * scale - top) * factor)
            store(z, at + labels[row], (exp(value - top) * share - _ONE) * (_ONE - bend * bend) * scale)


def cross_entropy_(z: Tensor, labels: Tensor, softcap: float | None, scale: float, gradient: bool) -> Tensor:
    """() summed loss of raw logits z (n, V), which become dloss/dz where `gradient`; labels (n,)."""
    if z.dtype == torch.float16 or not z.is_contiguous() or z.shape[1] == 0:
        return reference.cross_entropy_(z, labels, softcap, scale, gradient)
    losses = z.new_empty(len(z), dtype=torch.float32)
    _rows(len(z), z, labels.contiguous(), losses, z.shape[1], scale, softcap or 0.0, gradient)
    return losses.sum()
