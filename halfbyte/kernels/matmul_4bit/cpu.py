"""matmul_4bit on the CPU: for a few rows the packed bytes are multiplied as they are read; for more the weight is dense for one product.

Few rows (decoding a token): every byte of the weight is read once and that read is the time it takes, 0.52 bytes per element instead of 2.
Per block the codebook is scaled, and rounded as the dense weight would be, in one register; per 32 elements 16 bytes are widened,
the high nibbles pick the levels of the even elements and the low ones those of the odd elements, and both are multiplied with x, whose
even and odd elements were put apart beforehand.  Sums are float32.

Many rows: dequantized into a buffer that is used again (`scratch.py`), then the library's product.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels import instructions
from halfbyte.kernels.dequantize_blockwise import dequantize_into
from halfbyte.kernels.dequantize_blockwise.cpu import SCALES, level_of, scale_arguments, scale_of
from halfbyte.kernels.native import Bound, native, store
from halfbyte.kernels.scalars import narrow, widen
from halfbyte.kernels.scratch import borrowed

FEW = 4  # rows of x
Nested = tuple[Tensor, Tensor, Tensor]
_WEIGHT = f"packed: u8*, {SCALES}, codebook: f32*, blocksize: i64, columns: i64, outputs: i64, narrowed: i64"


@native(f"x: f32*, {_WEIGHT}, y: T*", T=("bf16", "f32"), lazy=True)
def one_row() -> Any:
    """y[o] = x . W[o] for outputs first..last; `x` in 32s, even elements first; columns and blocksize are multiples of 32."""
    from halfbyte.kernels.vectors import bytes16, fused, high_nibbles, load16, look_up, plus, rounded_bf16, splat, times, total

    def kernel(  # type: ignore[no-untyped-def]
        x, packed, nested, absmax, codes, absmax2, levels2, offset, codebook, blocksize, columns, outputs, narrowed, y, first, last
    ):
        levels, zero = load16(codebook, 0), splat(np.float32(0))
        for output in range(first, last):
            at, block = output * columns, (output * columns) // blocksize
            left = (block + 1) * blocksize - at
            i, a, b, c, d = 0, zero, zero, zero, zero
            while i < columns:
                table = times(levels, splat(scale_of(block, nested, absmax, codes, absmax2, levels2, offset)))
                if narrowed:
                    table = rounded_bf16(table)
                end = min(columns, i + left)
                while i + 64 <= end:
                    v, w = bytes16(packed, (at + i) >> 1), bytes16(packed, (at + i + 32) >> 1)
                    a = fused(look_up(table, high_nibbles(v)), load16(x, i), a)
                    b = fused(look_up(table, v), load16(x, i + 16), b)
                    c = fused(look_up(table, high_nibbles(w)), load16(x, i + 32), c)
                    d = fused(look_up(table, w), load16(x, i + 48), d)
                    i += 64
                while i < end:
                    v = bytes16(packed, (at + i) >> 1)
                    a = fused(look_up(table, high_nibbles(v)), load16(x, i), a)
                    b = fused(look_up(table, v), load16(x, i + 16), b)
                    i += 32
                block, left = block + 1, blocksize
            store(y, output, total(plus(plus(a, b), plus(c, d))))

    return kernel


@native(f"x: f32*, {_WEIGHT}, y: T*", T=("bf16", "f32"), lazy=True)
def four_rows() -> Any:
    """The same for four rows of x, y (4, outputs)."""
    from halfbyte.kernels.vectors import bytes16, fused, high_nibbles, load16, look_up, rounded_bf16, splat, times, total

    def kernel(  # type: ignore[no-untyped-def]
        x, packed, nested, absmax, codes, absmax2, levels2, offset, codebook, blocksize, columns, outputs, narrowed, y, first, last
    ):
        levels, zero = load16(codebook, 0), splat(np.float32(0))
        for output in range(first, last):
            at, block = output * columns, (output * columns) // blocksize
            left = (block + 1) * blocksize - at
            i, a, b, c, d = 0, zero, zero, zero, zero
            while i < columns:
                table = times(levels, splat(scale_of(block, nested, absmax, codes, absmax2, levels2, offset)))
                if narrowed:
                    table = rounded_bf16(table)
                end = min(columns, i + left)
                while i < end:
                    v = bytes16(packed, (at + i) >> 1)
                    even, odd = look_up(table, high_nibbles(v)), look_up(table, v)
                    a = fused(odd, load16(x, i + 16), fused(even, load16(x, i), a))
                    b = fused(odd, load16(x, columns + i + 16), fused(even, load16(x, columns + i), b))
                    c = fused(odd, load16(x, 2 * columns + i + 16), fused(even, load16(x, 2 * columns + i), c))
                    d = fused(odd, load16(x, 3 * columns + i + 16), fused(even, load16(x, 3 * columns + i), d))
                    i += 32
                block, left = block + 1, blocksize
            store(y, output, total(a))
            store(y, outputs + output, total(b))
            store(y, 2 * outputs + output, total(c))
            store(y, 3 * outputs + output, total(d))

    return kernel


@native(f"x: bf16*, {_WEIGHT}, y: T*", T=("bf16",), lazy=True)
def one_row_short() -> Any:
    """The same with bfloat16 products; `x` in 64s, even elements first; columns and blocksize are multiples of 64.

    The scale is applied to the sum of a block, so that the table stays as it is: its 16 levels are rounded, not their products with scales.
    """
    from halfbyte.kernels.short_vectors import above4, bytes32, load32, look_up32, pair_products, twice_bf16
    from halfbyte.kernels.vectors import fused, load16, plus, splat, total

    def kernel(  # type: ignore[no-untyped-def]
        x, packed, nested, absmax, codes, absmax2, levels2, offset, codebook, blocksize, columns, outputs, narrowed, y, first, last
    ):
        table, zero = twice_bf16(load16(codebook, 0)), splat(np.float32(0))
        scales = (nested, absmax, codes, absmax2, levels2, offset)
        for output in range(first, last):
            at = output * columns
            block = at // blocksize
            i, a, b, k = 0, zero, zero, 0
            if blocksize == 64:
                while i + 128 <= columns:
                    v, w = bytes32(packed, (at + i) >> 1), bytes32(packed, (at + i + 64) >> 1)
                    even = pair_products(zero, look_up32(table, above4(v)), load32(x, i))
                    a = fused(pair_products(even, look_up32(table, v), load32(x, i + 32)), splat(scale_of(block + k, *scales)), a)
                    even = pair_products(zero, look_up32(table, above4(w)), load32(x, i + 64))
                    b = fused(pair_products(even, look_up32(table, w), load32(x, i + 96)), splat(scale_of(block + k + 1, *scales)), b)
                    i, k = i + 128, k + 2
            left = (block + k + 1) * blocksize - at - i
            while i < columns:
                end, part = min(columns, i + left), zero
                while i < end:
                    v = bytes32(packed, (at + i) >> 1)
                    part = pair_products(part, look_up32(table, above4(v)), load32(x, i))
                    part = pair_products(part, look_up32(table, v), load32(x, i + 32))
                    i += 64
                a = fused(part, splat(scale_of(block + k, *scales)), a)
                k, left = k + 1, blocksize
            store(y, output, total(plus(a, b)))

    return kernel


@native(f"x: f32*, rows: i64, {_WEIGHT}, y: T*", T=("bf16", "f32"))
def any_shape(  # type: ignore[no-untyped-def]
    x, rows, packed, nested, absmax, codes, absmax2, levels2, offset, codebook, blocksize, columns, outputs, narrowed, y, first, last
):
    """The same one by one, for widths and block sizes that are no multiple of 32; `x` (rows, columns) as it is."""
    for output in range(first, last):
        for row in range(rows):
            total = np.float32(0)
            for i in range(columns):
                at = output * columns + i
                scale = scale_of(at // blocksize, nested, absmax, codes, absmax2, levels2, offset)
                weight = level_of(packed, at, codebook) * scale
                total += (widen(narrow(weight)) if narrowed else weight) * x[row * columns + i]
            store(y, row * outputs + output, total)


@native("x: bf16*, y: bf16*")
def order(x, y, first, last):  # type: ignore[no-untyped-def]
    """64s first..last of x, the even elements of each before the odd ones: as `one_row_short` reads them."""
    for part in range(first, last):
        for i in range(32):
            y[64 * part + i] = x[64 * part + 2 * i]
            y[64 * part + 32 + i] = x[64 * part + 2 * i + 1]


def bound_row(x: Tensor, y: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int],
    dtype: torch.dtype, nested: Nested | None,
) -> Bound | None:  # fmt: skip
    """The product of one row, ready to run again: x (I,) as `order` leaves it, y (O,); None where processor or shape do not serve."""
    outputs, columns = shape
    if columns % 64 or blocksize % 64 or dtype not in (torch.bfloat16, torch.float32) or not instructions.short_products():
        return None
    weight = (packed.contiguous(), *scale_arguments(absmax, nested), codebook.contiguous(), blocksize, columns, outputs, 1)
    return one_row_short.bind(outputs, x, *weight, y, work=outputs * columns)


def matmul_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """x (..., I), packed weight of `shape` (O, I) -> (..., O) in x's dtype."""
    rows = x.numel() // max(1, shape[1])
    if rows > FEW or not {x.dtype, dtype} <= {torch.bfloat16, torch.float32}:
        with _dense(packed, absmax, codebook, blocksize, shape, dtype, x.dtype, nested) as weight_OI:
            return torch.nn.functional.linear(x, weight_OI)
    return few_rows(Activations(x.detach(), rows), packed, absmax, codebook, blocksize, shape, dtype, nested)


def matmuls_4bit(x: Tensor, weights: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """x (..., I) times each of several weights (the other arguments of `matmul_4bit`)."""
    rows = x.numel() // max(1, x.shape[-1])
    few = rows <= FEW and x.dtype in (torch.bfloat16, torch.float32)
    shared = Activations(x.detach(), rows)
    return [
        few_rows(shared, *weight) if few and weight[5] in (torch.bfloat16, torch.float32) else matmul_4bit(x, *weight) for weight in weights
    ]


def input_gradient(
    dy: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """dy (..., O) -> dx (..., I)."""
    with _dense(packed, absmax, codebook, blocksize, shape, dtype, dy.dtype, nested) as weight_OI:
        return dy @ weight_OI


@contextmanager
def _dense(
    packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype, compute: torch.dtype,
    nested: Nested | None,
) -> Iterator[Tensor]:  # fmt: skip
    """(O, I) of type `compute`, rounded to `dtype` on the way."""
    # a float32 weight is rounded once, to what is asked for; a narrower one is rounded to its own type first
    stored = compute if dtype == torch.float32 else dtype
    with borrowed((shape[0], shape[1]), stored, packed.device) as weight_OI:
        yield dequantize_into(weight_OI, packed, absmax, codebook, blocksize, nested).to(compute)


@dataclass
class Activations:
    """Up to four rows of x, put in the order a kernel reads them in when it is first asked for: weights that share an input share it."""

    x: Tensor
    rows: int
    _ordered: dict[str, Tensor] = field(default_factory=dict)

    def ordered(self, kind: str) -> Tensor:
        """Even elements before odd ones in 64s (`short`), in 32s (`one`), the same in four rows (`four`), or as they are (`any`)."""
        if kind not in self._ordered:
            columns = self.x.shape[-1]
            if kind == "short":
                made = self.x.reshape(columns // 64, 32, 2).transpose(1, 2).contiguous()
            elif kind == "any":
                made = self.x.float().contiguous()
            else:
                apart = self.x.float().reshape(self.rows, columns // 32, 16, 2).transpose(2, 3)
                if kind == "one":
                    made = apart.contiguous()
                else:
                    made = torch.zeros((FEW, columns // 32, 2, 16), dtype=torch.float32)
                    made[: self.rows] = apart
            self._ordered[kind] = made
        return self._ordered[kind]


def few_rows(
    x: Activations, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    nested: Nested | None,
) -> Tensor:  # fmt: skip
    """The product without a dense weight, (..., O)."""
    outputs, columns = shape
    kind, rows = x.x.dtype, x.rows
    short = kind == torch.bfloat16 and rows == 1 and columns % 64 == 0 and blocksize % 64 == 0 and instructions.short_products()
    narrowed = int(torch.bfloat16 in (kind, dtype))
    weight = (packed.contiguous(), *scale_arguments(absmax, nested), codebook.contiguous(), blocksize, columns, outputs, narrowed)
    work = outputs * columns
    if columns % 32 or blocksize % 32:
        y = torch.empty((rows, outputs), dtype=kind)
        any_shape(outputs, x.ordered("any"), rows, *weight, y, work=work)
    elif rows == 1:
        y = torch.empty((1, outputs), dtype=kind)
        kernel, order = (one_row_short, "short") if short else (one_row, "one")
        kernel(outputs, x.ordered(order), *weight, y, work=work)
    else:
        y = torch.empty((FEW, outputs), dtype=kind)
        four_rows(outputs, x.ordered("four"), *weight, y, work=work)
        y = y[:rows]
    return y.reshape(*x.x.shape[:-1], outputs)
