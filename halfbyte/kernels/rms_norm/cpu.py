"""rms_norm on the CPU: two passes over a row that stays in the nearest cache, one read and one write of memory.

The weight arrives as the float32 factor of n, 1 + w for form 2.  float16 takes the reference: there are no instructions for it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.native import load, native, store
from halfbyte.kernels.rms_norm import reference
from halfbyte.kernels.scalars import narrow, widen

STRIP = 64
"""Columns of the weight's gradient that one item sums over all rows."""


@native(
    "x: T*, residual: T*, summed: T*, w: f32*, y: T*, rstd: f32*, H: i64, eps: f32, added: i64, twice: i64",
    T=("bf16", "f32"), fast=True, apart=True,
)  # fmt: skip
def norm_rows(
    x: Any, residual: Any, summed: Any, w: Any, y: Any, rstd: Any, H: int, eps: float, added: int, twice: int, first: int, last: int
) -> None:  # fmt: skip
    """Rows of `summed`, which are made first where `added` says so; `twice`: n is rounded to bfloat16 on its own, then the product."""
    for row in range(first, last):
        at = row * H
        if added:
            for i in range(H):
                store(summed, at + i, load(x, at + i) + load(residual, at + i))
        total = np.float32(0)
        for i in range(H):
            value = load(summed, at + i)
            total += value * value
        r = np.float32(1) / np.sqrt(total / np.float32(H) + eps)
        rstd[row] = r
        if twice:
            for i in range(H):
                store(y, at + i, widen(narrow(load(summed, at + i) * r)) * w[i])
        else:
            for i in range(H):
                store(y, at + i, load(summed, at + i) * r * w[i])


@native("dy: T*, x: T*, w: f32*, rstd: f32*, extra: T*, dx: T*, H: i64, added: i64", T=("bf16", "f32"), fast=True, apart=True)
def _dx(dy: Any, x: Any, w: Any, rstd: Any, extra: Any, dx: Any, H: int, added: int, first: int, last: int) -> None:
    for row in range(first, last):
        at, r = row * H, rstd[row]
        total = np.float32(0)
        for i in range(H):
            total += load(dy, at + i) * w[i] * load(x, at + i)
        mean = total * r * r / np.float32(H)
        if added:
            for i in range(H):
                store(dx, at + i, (load(dy, at + i) * w[i] - load(x, at + i) * mean) * r + load(extra, at + i))
        else:
            for i in range(H):
                store(dx, at + i, (load(dy, at + i) * w[i] - load(x, at + i) * mean) * r)


@native("x: T*, rstd: f32*, n: T*, H: i64", T=("bf16", "f32"))
def _round_n(x: Any, rstd: Any, n: Any, H: int, first: int, last: int) -> None:
    for row in range(first, last):
        at, r = row * H, rstd[row]
        for i in range(H):
            store(n, at + i, load(x, at + i) * r)


@native("dy: T*, x: T*, rstd: f32*, dw: f32*, rows: i64, H: i64, scaled: i64", T=("bf16", "f32"), fast=True, apart=True)
def _dw(dy: Any, x: Any, rstd: Any, dw: Any, rows: int, H: int, scaled: int, first: int, last: int) -> None:
    """Strips first..last of the columns: sums over the rows in their order, whatever the number of threads."""
    for strip in range(first, last):
        begin = strip * STRIP
        size = min(STRIP, H - begin)
        for row in range(rows):
            at = row * H + begin
            r = rstd[row] if scaled else np.float32(1)
            for i in range(size):
                dw[begin + i] += load(dy, at + i) * load(x, at + i) * r


def _factor(weight: Tensor, form: int) -> Tensor:
    wide = weight.detach().float().contiguous()
    return wide + 1 if form == 2 else wide


def _twice(x: Tensor, form: int) -> bool:
    return form == 0 and x.dtype == torch.bfloat16


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """x (..., H) -> (y (..., H), rstd (...))."""
    if x.dtype == torch.float16:
        return reference.rms_norm(x, weight, eps, form)
    x = x.contiguous()
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    norm_rows(rstd.numel(), None, None, x, _factor(weight, form), y, rstd, x.shape[-1], eps, False, _twice(x, form))
    return y, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (..., H) -> (their sum, y of it, rstd (...))."""
    if x.dtype == torch.float16:
        return reference.add_rms_norm(x, residual, weight, eps, form)
    x, residual = x.contiguous(), residual.contiguous()
    summed, y, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    norm_rows(rstd.numel(), x, residual, summed, _factor(weight, form), y, rstd, x.shape[-1], eps, True, _twice(x, form))
    return summed, y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: int, extra: Tensor | None = None) -> Tensor:
    """dx (..., H)."""
    if x.dtype == torch.float16:
        return reference.rms_norm_backward(dy, x, weight, rstd, form, extra)
    dy, x, rstd = dy.contiguous(), x.contiguous(), rstd.contiguous()
    extra = None if extra is None else extra.contiguous()
    dx = torch.empty_like(x)
    _dx(rstd.numel(), dy, x, _factor(weight, form), rstd, extra, dx, x.shape[-1], extra is not None)
    return dx


def rms_norm_weight_grad(dy: Tensor, x: Tensor, rstd: Tensor, form: int) -> Tensor:
    """dw (H,)."""
    if x.dtype == torch.float16:
        return reference.rms_norm_weight_grad(dy, x, rstd, form)
    dy, x, rstd, width = dy.contiguous(), x.contiguous(), rstd.contiguous(), x.shape[-1]
    rounds = _twice(x, form)
    if rounds:
        n = torch.empty_like(x)
        _round_n(rstd.numel(), x, rstd, n, width)
        x = n
    dw = x.new_zeros(width, dtype=torch.float32)
    _dw(-(-width // STRIP), dy, x, rstd, dw, rstd.numel(), width, not rounds)
    return dw
