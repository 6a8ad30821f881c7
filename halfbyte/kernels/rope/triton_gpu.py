"""rope in Triton: a program turns the heads of one token, so that its angles are read once for all of them.

x is read where it lies, a slice of a fused projection included.  In place each number is read by the program that writes it.

Proven in Triton's interpreter against the reference; compiled for sm_90 and sm_80, not yet timed on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.triton_launch import launch, power_of_2

TILE = 2048  # pairs of one program


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, y, cos, sin, heads, width, angles, groups, x_token, x_head, y_token, y_head,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token; REST columns that do not turn are copied (0: in place, or there are none)."""
    token = tl.program_id(0).to(tl.int64) // groups
    head = tl.program_id(0).to(tl.int64) % groups * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    half = angles // 2
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    source = x + token * x_token + head[:, None] * x_head + pair[None, :]
    target = y + token * y_token + head[:, None] * y_head + pair[None, :]
    angle, turns = token * angles + pair, pair < half
    cos_one = tl.load(cos + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
    cos_two = tl.load(cos + angle + half, mask=turns, other=0.0).to(tl.float32)[None, :]
    sin_one = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
    sin_two = tl.load(sin + angle + half, mask=turns, other=0.0).to(tl.float32)[None, :]
    one = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        first, second = one * cos_one + two * sin_two, two * cos_two - one * sin_one
    else:
        first, second = one * cos_one - two * sin_one, two * cos_two + one * sin_two
    tl.store(target, first.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half, second.to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        column = angles + tl.arange(0, REST)
        through = (head < heads)[:, None] & (column < width)[None, :]
        value = tl.load(x + token * x_token + head[:, None] * x_head + column[None, :], mask=through)
        tl.store(y + token * y_token + head[:, None] * y_head + column[None, :], value, mask=through)


def _run(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    (tokens, heads, width), angles = x.shape, cos.shape[1]
    if not x.numel():
        return
    pairs = power_of_2(angles // 2)
    together = min(power_of_2(heads), max(1, TILE // pairs))
    groups = -(-heads // together)
    rest = 0 if x.data_ptr() == y.data_ptr() or angles == width else power_of_2(width - angles)
    launch(
        _turn, tokens * groups, x, y, cos.contiguous(), sin.contiguous(), heads, width, angles, groups, *x.stride()[:2], *y.stride()[:2],
        INVERSE=inverse, HEADS=together, PAIRS=pairs, REST=rest,
    )  # fmt: skip


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x (T, H, D), cos and sin (T, R) -> (T, H, D), contiguous."""
    x = x if x.stride(2) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    _run(x, y, cos, sin, inverse)
    return y


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """The same in place."""
    if x.stride(2) == 1:
        _run(x, x, cos, sin, inverse)
    else:
        x.copy_(rope(x, cos, sin, inverse))
