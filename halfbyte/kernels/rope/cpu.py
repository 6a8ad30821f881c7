"""rope on the CPU: one pass, one token's angles at a time.

float16 takes the reference: there are no instructions for it.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.native import load, native, store
from halfbyte.kernels.rope import reference


@native(
    "x: T*, y: T*, cos: f32*, sin: f32*, H: i64, D: i64, R: i64, x_token: i64, x_head: i64, y_token: i64, y_head: i64, inverse: i64",
    T=("bf16", "f32"),
)
def _turn(
    x: Any, y: Any, cos: Any, sin: Any, H: int, D: int, R: int, x_token: int, x_head: int, y_token: int, y_head: int, inverse: int,
    first: int, last: int,
) -> None:  # fmt: skip
    half = R // 2
    for token in range(first, last):
        c = token * R
        d = c + half
        for head in range(H):
            a = token * x_token + head * x_head
            b = a + half
            p = token * y_token + head * y_head
            q = p + half
            if inverse:
                for i in range(half):
                    one, two = load(x, a + i), load(x, b + i)
                    store(y, p + i, one * cos[c + i] + two * sin[d + i])
                    store(y, q + i, two * cos[d + i] - one * sin[c + i])
            else:
                for i in range(half):
                    one, two = load(x, a + i), load(x, b + i)
                    store(y, p + i, one * cos[c + i] - two * sin[c + i])
                    store(y, q + i, two * cos[d + i] + one * sin[d + i])
            for i in range(R, D):
                y[p + i] = x[a + i]


def _flat(x: Tensor) -> Tensor:
    """All that lies between x's first and last element, as one row."""
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride()))
    return x.as_strided((extent,), (1,))


def _run(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    if x.numel():
        (tokens, heads, width), angles = x.shape, cos.shape[1]
        tables = cos.float().contiguous(), sin.float().contiguous()
        strides = *x.stride()[:2], *y.stride()[:2]
        _turn(tokens, _flat(x), _flat(y), *tables, heads, width, angles, *strides, inverse, work=x.numel())


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x (T, H, D), cos and sin (T, R) -> (T, H, D), contiguous."""
    if x.dtype == torch.float16:
        return reference.rope(x, cos, sin, inverse)
    x = x if x.stride(2) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    _run(x, y, cos, sin, inverse)
    return y


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """The same in place."""
    if x.dtype == torch.float16 or x.stride(2) != 1:
        reference.rope_(x, cos, sin, inverse)
    else:
        _run(x, x, cos, sin, inverse)
