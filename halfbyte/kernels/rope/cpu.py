"""rope on the CPU: one pass, one token's angles at a time.

float16 takes the reference: there are no instructions for it.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.native import load, native, store
from halfbyte.kernels.rope import reference


@native(
    "x: T*, y: T*, cos: f32*, sin: f32*, heads: i64, width: i64, angles: i64, token_step: i64, head_step: i64, inverse: i64",
    T=("bf16", "f32"), apart=True,
)  # fmt: skip
def turn(
    x: Any, y: Any, cos: Any, sin: Any, heads: int, width: int, angles: int, token_step: int, head_step: int, inverse: int,
    first: int, last: int,
) -> None:  # fmt: skip
    half = angles // 2
    for token in range(first, last):
        c = token * angles
        d = c + half
        for head in range(heads):
            a = token * token_step + head * head_step
            b = a + half
            p = (token * heads + head) * width
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
            for i in range(angles, width):
                y[p + i] = x[a + i]


@native(
    "x: T*, cos: f32*, sin: f32*, heads: i64, angles: i64, token_step: i64, head_step: i64, inverse: i64", T=("bf16", "f32"), apart=True
)
def _turn_in_place(
    x: Any, cos: Any, sin: Any, heads: int, angles: int, token_step: int, head_step: int, inverse: int, first: int, last: int
) -> None:  # fmt: skip
    half = angles // 2
    for token in range(first, last):
        c = token * angles
        d = c + half
        for head in range(heads):
            a = token * token_step + head * head_step
            b = a + half
            if inverse:
                for i in range(half):
                    one, two = load(x, a + i), load(x, b + i)
                    store(x, a + i, one * cos[c + i] + two * sin[d + i])
                    store(x, b + i, two * cos[d + i] - one * sin[c + i])
            else:
                for i in range(half):
                    one, two = load(x, a + i), load(x, b + i)
                    store(x, a + i, one * cos[c + i] - two * sin[c + i])
                    store(x, b + i, two * cos[d + i] + one * sin[d + i])


def _flat(x: Tensor) -> Tensor:
    """All that lies between x's first and last element, as one row."""
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride()))
    return x.as_strided((extent,), (1,))


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.float().contiguous(), sin.float().contiguous()


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x (T, H, D), cos and sin (T, R) -> (T, H, D), contiguous."""
    if x.dtype == torch.float16:
        return reference.rope(x, cos, sin, inverse)
    x = x if x.stride(2) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    if y.numel():
        tokens, heads, width = x.shape
        turn(tokens, _flat(x), y, *_tables(cos, sin), heads, width, cos.shape[1], x.stride(0), x.stride(1), inverse, work=y.numel())
    return y


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """The same in place."""
    if x.dtype == torch.float16 or x.stride(2) != 1:
        reference.rope_(x, cos, sin, inverse)
    elif x.numel():
        tokens, heads, _ = x.shape
        _turn_in_place(tokens, _flat(x), *_tables(cos, sin), heads, cos.shape[1], x.stride(0), x.stride(1), inverse, work=x.numel())
