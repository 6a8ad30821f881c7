"""gemv on the CPU: products of pairs of bfloat16, summed in float32, where the processor has them; else the library's product."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels import instructions
from halfbyte.kernels.native import native, store


@native("x: bf16*, weight: bf16*, columns: i64, y: bf16*", lazy=True)
def _row() -> Any:
    """Outputs first..last; columns are a multiple of 32."""
    from halfbyte.kernels.short_vectors import load32, pair_products
    from halfbyte.kernels.vectors import plus, splat, total

    def kernel(x, weight, columns, y, first, last):  # type: ignore[no-untyped-def]
        zero = splat(np.float32(0))
        for output in range(first, last):
            at = output * columns
            i, a, b, c, d = 0, zero, zero, zero, zero
            while i + 128 <= columns:
                a = pair_products(a, load32(weight, at + i), load32(x, i))
                b = pair_products(b, load32(weight, at + i + 32), load32(x, i + 32))
                c = pair_products(c, load32(weight, at + i + 64), load32(x, i + 64))
                d = pair_products(d, load32(weight, at + i + 96), load32(x, i + 96))
                i += 128
            while i < columns:
                a = pair_products(a, load32(weight, at + i), load32(x, i))
                i += 32
            store(y, output, total(plus(plus(a, b), plus(c, d))))

    return kernel


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    outputs, columns = weight.shape
    short = x.dtype == torch.bfloat16 and columns % 32 == 0 and weight.is_contiguous() and instructions.short_products()
    if not short or not outputs:
        return torch.nn.functional.linear(x, weight, bias)
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    _row(outputs, x.contiguous(), weight, columns, y, work=weight.numel())
    return y if bias is None else y + bias.to(y.dtype)
