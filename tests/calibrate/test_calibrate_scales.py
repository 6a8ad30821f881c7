"""Searched scales: the formula against brute force in float64, the bytes against bitsandbytes, and never worse than plain NF4."""

import pytest
import torch
from bitsandbytes.functional import QuantState as TheirState
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from halfbyte.calibrate.scales import FLOOR, GRID, importance_of, quantize_weighted
from halfbyte.errors import WeightError
from halfbyte.formats import bnb4bit
from halfbyte.quant import blockwise
from halfbyte.quant.codebooks import CODEBOOKS

SHAPES = [(8, 64), (6, 40), (5, 33), (3, 200), (1, 7)]


def brute_force(weight_OI: Tensor, importance_I: Tensor, blocksize: int) -> Tensor:
    """(N,) least weighted error of each block over the grid, one element at a time, in float64."""
    levels = CODEBOOKS["nf4"].double()
    flat, wide = weight_OI.reshape(-1).double(), importance_I.double().repeat(weight_OI.shape[0])
    least = []
    for start in range(0, flat.numel(), blocksize):
        block, weights = flat[start : start + blocksize], wide[start : start + blocksize]
        errors = []
        for multiple in GRID:
            scale = block.abs().max() * multiple
            gaps = (block[:, None] - scale * levels[None]).square().min(dim=1).values
            errors.append(float((gaps * weights).sum()))
        least.append(min(errors))
    return torch.tensor(least, dtype=torch.float64)


def error_of(weight_OI: Tensor, importance_I: Tensor, packed: Tensor, state: blockwise.QuantState, blocksize: int) -> Tensor:
    """(N,) weighted error of each block as stored, in float64."""
    gap = (weight_OI - blockwise.dequantize(packed, state, torch.float32)).double().square() * importance_I.double()
    return torch.stack([part.sum() for part in gap.reshape(-1).split(blocksize)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64])
def test_scales_are_the_best_of_the_grid(shape: tuple[int, int], blocksize: int) -> None:
    """# T47 # T51  Also where blocks begin inside a row, and where the last one is shorter: each element has its column's weight."""
    torch.manual_seed(sum(shape))
    weight, importance = torch.randn(shape), torch.rand(shape[1]).square() * 5 + 0.01
    packed, state = quantize_weighted(weight, importance, blocksize=blocksize, double_quant=False)
    found, wanted = error_of(weight, importance, packed, state, blocksize), brute_force(weight, importance, blocksize)
    assert torch.allclose(found, wanted, rtol=1e-4)
    plain = error_of(weight, importance, *blockwise.quantize(weight, blocksize=blocksize, double_quant=False), blocksize)
    assert bool((found <= plain * (1 + 1e-6)).all()) and bool((found < plain).any())


def test_a_view_in_another_order_of_memory_is_quantized_by_rows() -> None:
    """# T51"""
    torch.manual_seed(2)
    weight, importance = torch.randn(48, 20), torch.rand(48) + 0.1
    assert torch.equal(quantize_weighted(weight.T, importance)[0], quantize_weighted(weight.T.contiguous(), importance)[0])


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_the_plain_format(shape: tuple[int, int], format: str) -> None:
    """# T53  bitsandbytes reads the tensors and dequantizes them to equal bits; their shapes and types are those of plain quantization."""
    torch.manual_seed(1)
    weight, importance = torch.randn(shape), torch.rand(shape[1]) + 0.05
    packed, state = quantize_weighted(weight, importance, format)
    named, usual = bnb4bit.to_named_tensors("w", packed, state), bnb4bit.to_named_tensors("w", *blockwise.quantize(weight, format))
    facts = [{key: (value.shape, value.dtype) for key, value in one.items() if "bitsandbytes__" not in key} for one in (named, usual)]
    assert facts[0] == facts[1] and set(named) == set(usual)
    theirs = TheirState.from_dict({key.removeprefix("w."): value for key, value in named.items() if key != "w"}, torch.device("cpu"))
    assert torch.equal(dequantize_4bit(named["w"], theirs), blockwise.dequantize(packed, state, theirs.dtype))


def test_codes_are_picked_for_the_scale_as_it_reads_back() -> None:
    """# T53  After double quantization every element has the level nearest to it."""
    torch.manual_seed(4)
    weight = torch.randn(64, 64) * torch.logspace(-2, 1, 64)[:, None]
    packed, state = quantize_weighted(weight, torch.ones(64))
    scales = blockwise.plain_absmax(state).repeat_interleave(64)[:, None]
    nearest = (weight.reshape(-1, 1) - scales * CODEBOOKS["nf4"]).abs().min(dim=1).values
    assert torch.allclose((weight - blockwise.dequantize(packed, state)).abs().reshape(-1), nearest, atol=1e-6)
    searched = [blockwise.quantize(weight)[1], state]
    assert not torch.equal(blockwise.plain_absmax(searched[0]), blockwise.plain_absmax(searched[1]))


def test_the_scale_of_the_plain_format_gives_the_plain_bytes() -> None:
    """# T48"""
    torch.manual_seed(5)
    weight = torch.randn(40, 48)
    packed, state = blockwise.quantize(weight, double_quant=False)
    again, same = blockwise.pack_with_scales(weight, state.absmax, double_quant=False)
    assert torch.equal(packed, again) and torch.equal(state.absmax, same.absmax)


def test_weights_that_are_zero_stay_zero() -> None:
    """# T49"""
    weight = torch.zeros(4, 64)
    weight[2] = torch.randn(64)
    for double_quant in (False, True):
        read = blockwise.dequantize(*quantize_weighted(weight, torch.ones(64), double_quant=double_quant))
        assert bool(torch.isfinite(read).all()) and not read[0].any() and read[2].any()
    nothing = torch.zeros(4, 64)
    packed, _ = quantize_weighted(nothing, torch.ones(64), double_quant=False)
    assert torch.equal(packed, blockwise.quantize(nothing, double_quant=False)[0])


def test_weights_that_are_not_finite_are_refused() -> None:
    """# T50"""
    weight = torch.randn(8, 64)
    weight[3, 5], weight[1, 1] = torch.nan, torch.inf
    with pytest.raises(WeightError, match=r"2 of 512 elements"):
        quantize_weighted(weight, torch.ones(64), name="w")


def test_importance_has_a_floor_and_a_mean_of_one() -> None:
    found = importance_of(torch.tensor([0.0, 1e-9, 1.0, 3.0]))
    assert torch.allclose(found, torch.tensor([FLOOR, FLOOR, 1.0, 3.0]), atol=1e-6)
    assert torch.equal(importance_of(torch.zeros(3)), torch.ones(3))
