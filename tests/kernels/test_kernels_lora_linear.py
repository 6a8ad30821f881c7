"""lora_linear and the gated MLP block against the same sums written with autograd, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from halfbyte.kernels.gated_mlp.block import Mlp, gated_mlp
from halfbyte.kernels.lora_linear import Norm, Projection, lora_linear

T, H, F, R = 5, 6, 8, 2


def made(rows: int, columns: int, scaling: float | None) -> tuple[Projection, tuple[Tensor, ...], Tensor]:
    """(projection, its factors, its weight); no update where `scaling` is None."""
    weight = torch.randn(rows, columns, dtype=torch.float64)
    shapes = () if scaling is None else ((R, columns), (rows, R))
    factors = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return Projection(lambda dtype: weight.to(dtype), None, factors, scaling or 0.0), factors, weight


def plain(x: Tensor, projection: Projection, weight: Tensor) -> Tensor:
    y = linear(x, weight)
    return y if not projection.factors else y + projection.scaling * linear(linear(x, projection.factors[0]), projection.factors[1])


def same(found: Any, wanted: Any, inputs: list[Tensor]) -> None:
    """Values and every gradient."""
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scalings", [(1.5, 1.5), (1.5, None), (None, 0.5), (0.0, 1.5), (1.5, 0.0), (None, None)])
def test_projections_with_and_without_updates_and_an_update_of_no_weight(scalings: tuple[float | None, float | None]) -> None:
    """An update that is scaled by 0 is still one: its factors get gradients of 0, and nobody else's."""
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    parts = [made(rows, H, scaling) for rows, scaling in zip((4, 7), scalings)]
    found = torch.cat(lora_linear(x, [projection for projection, _, _ in parts]), dim=1)
    wanted = torch.cat([plain(x, projection, weight) for projection, _, weight in parts], dim=1)
    same(found, wanted, [x, *(factor for _, factors, _ in parts for factor in factors)])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("scalings", [(1.5, 0.5, 2.0), (0.0, 1.5, 0.0), (None, 1.5, None), (1.0, None, 0.5)])
def test_the_whole_mlp_with_any_of_its_updates(scalings: tuple[float | None, ...], keep: bool) -> None:
    """Residual, norm, gate, up, activation, down."""
    residual, delta = (torch.randn(T, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(H, dtype=torch.float64) + 0.5
    gate, up, down = (made(*shape, scaling) for shape, scaling in zip(((F, H), (F, H), (H, F)), scalings))
    found = gated_mlp(residual, delta, Norm(weight, 1e-5, 0), Mlp((gate[0], up[0]), down[0], "silu"), keep)
    summed = residual + delta
    normed = summed * (summed.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    inner = silu(plain(normed, gate[0], gate[2])) * plain(normed, up[0], up[2])
    same(found, summed + plain(inner, down[0], down[2]), [residual, delta, *gate[1], *up[1], *down[1]])
