"""rms_norm in Triton: a row is read once, stays in registers and is written once.

A program takes one row, or several where they are short (a norm per head).  The weight's gradient is summed over rows in two steps,
each program over its own rows and then all programs' sums, in an order that does not change from run to run.

Proven in Triton's interpreter against the reference; compiled for sm_90 and sm_80, not yet timed on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.rows import as_rows
from halfbyte.kernels.triton_launch import launch, power_of_2

TILE = 2048  # elements of one program where rows are shorter
PARTS = 256  # programs that sum the weight's gradient


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x, residual, summed, weight, y, rstd, rows, columns, x_row, residual_row, eps,
    FORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row[:, None] * residual_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(summed.dtype.element_ty)  # the norm is of what the next layer will read
        tl.store(summed + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, axis=1) / columns + eps)
    tl.store(rstd + row, r, mask=row < rows)
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    n = value * r[:, None]
    if FORM == 0:
        n = n.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (n * (w + 1.0 if FORM == 2 else w)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dx(  # type: ignore[no-untyped-def]
    dy, x, weight, rstd, extra, dx, rows, columns, dy_row, x_row, extra_row,
    FORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    n = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32) * r
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    g = tl.load(dy + row[:, None] * dy_row + column[None, :], mask=inside, other=0.0).to(tl.float32) * (w + 1.0 if FORM == 2 else w)
    mean = tl.sum(g * n, axis=1) / columns
    value = r * (g - n * mean[:, None])
    if extra is not None:
        value += tl.load(extra + row[:, None] * extra_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row[:, None] * columns + column[None, :], value.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _dw(  # type: ignore[no-untyped-def]
    dy, x, rstd, sums, rows, columns, dy_row, x_row, each,
    FORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program p: sums[p] = sum over rows p * each .. (p + 1) * each of dy n."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, each, ROWS):
        offset = start + tl.arange(0, ROWS)
        row = part * each + offset
        here = (row < rows) & (offset < each)
        inside = here[:, None] & (column < columns)[None, :]
        r = tl.load(rstd + row, mask=here, other=0.0)[:, None]
        n = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32) * r
        if FORM == 0:
            n = n.to(x.dtype.element_ty).to(tl.float32)
        total += tl.load(dy + row[:, None] * dy_row + column[None, :], mask=inside, other=0.0).to(tl.float32) * n
    tl.store(sums + part * columns + column, tl.sum(total, axis=0), mask=column < columns)


def _shape(columns: int) -> dict[str, Any]:
    """Rows and columns of a tile, and its warps: some 16 numbers a thread."""
    width = power_of_2(columns)
    rows = max(1, TILE // width)
    return {"ROWS": rows, "WIDTH": width, "warps": min(32, max(4, rows * width // 512))}


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, form: int) -> tuple[Tensor | None, Tensor, Tensor]:
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    summed = None if residual is None else x.new_empty(x.shape)
    if y.numel():
        rows, columns = rstd.numel(), x.shape[-1]
        (xs, x_row), shape = as_rows(x), _shape(columns)
        others, residual_row = (None, 0) if residual is None else as_rows(residual)
        launch(
            _norm, -(-rows // shape["ROWS"]), xs, others, summed, weight.contiguous(), y, rstd, rows, columns, x_row, residual_row, eps,
            FORM=form, **shape,
        )  # fmt: skip
    return summed, y, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """x (..., H) -> (y (..., H), rstd (...))."""
    _, y, rstd = _forward(x, None, weight, eps, form)
    return y, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (..., H) -> (their sum, y of it, rstd (...))."""
    summed, y, rstd = _forward(x, residual, weight, eps, form)
    assert summed is not None
    return summed, y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: int, extra: Tensor | None = None) -> Tensor:
    """dx (..., H)."""
    dx = x.new_empty(x.shape)
    if dx.numel():
        rows, columns = rstd.numel(), x.shape[-1]
        (dys, dy_row), (xs, x_row), shape = as_rows(dy), as_rows(x), _shape(columns)
        extras, extra_row = (None, 0) if extra is None else as_rows(extra)
        launch(
            _dx, -(-rows // shape["ROWS"]), dys, xs, weight.contiguous(), rstd.contiguous(), extras, dx, rows, columns, dy_row, x_row,
            extra_row, FORM=form, **shape,
        )  # fmt: skip
    return dx


def rms_norm_weight_grad(dy: Tensor, x: Tensor, rstd: Tensor, form: int) -> Tensor:
    """dw (H,)."""
    rows, columns = rstd.numel(), x.shape[-1]
    if not x.numel():
        return x.new_zeros(columns, dtype=torch.float32)
    (dys, dy_row), (xs, x_row), shape = as_rows(dy), as_rows(x), _shape(columns)
    each = -(-rows // min(PARTS, -(-rows // shape["ROWS"])))
    parts = -(-rows // each)
    sums = x.new_empty((parts, columns), dtype=torch.float32)
    launch(_dw, parts, dys, xs, rstd.contiguous(), sums, rows, columns, dy_row, x_row, each, FORM=form, **shape)
    return sums.sum(dim=0)
