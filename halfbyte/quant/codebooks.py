"""The level tables and how they come about: the only place with these numbers.

NF4      16 levels: quantiles of the normal distribution, so that each level is met equally often by normal weights.
         8 positive values Phi^-1(linspace(0.9677083, 0.5, 9)[:-1]), 7 negative -Phi^-1(linspace(0.9677083, 0.5, 8)[:-1]), and 0,
         sorted, divided by the largest.  Written out, for the published table fixes the last bit.
FP4      1 sign, 2 exponent, 1 mantissa bit, {0, 1/16, 8, 12, 4, 6, 2, 3} / 12; the index is the bit pattern, so it is not sorted.
dynamic  256 levels: for i = 0..6 the neighbour means of 2^i + 1 points of linspace(0.1, 1), times 10^(i-6), both signs, with 0 and
         1 added: seven decades, finer towards 1.  Unsigned: 2^(i+1) + 1 points, positive only.  There is no -1.

Sources: https://arxiv.org/abs/2305.14314 appendix E, https://arxiv.org/abs/2110.02861 section 2.
"""

import torch
from torch import Tensor

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _fp4() -> Tensor:
    half = torch.tensor(_FP4, dtype=torch.float32) / 12
    return torch.cat([half, torch.where(half == 0, half, -half)])  # index 8 is minus zero, stored as plus zero


def dynamic(signed: bool) -> Tensor:
    """(256,) float32, sorted: the dynamic 8-bit map, signed or unsigned."""
    levels = [0.0, 1.0]
    for decade in range(7):
        points = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float32)
        means = (10.0 ** (decade - 6) * ((points[:-1] + points[1:]) / 2)).tolist()
        levels += means + [-mean for mean in means] if signed else means
    return torch.tensor(sorted(levels), dtype=torch.float32)


CODEBOOKS: dict[str, Tensor] = {
    "nf4": torch.tensor(_NF4, dtype=torch.float32),
    "fp4": _fp4(),
    "dynamic-signed": dynamic(signed=True),
    "dynamic-unsigned": dynamic(signed=False),
}
