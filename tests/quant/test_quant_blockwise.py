"""Quantize and read back whole tensors: what is refused, memory layout, row blocks, double quantization, the tables."""

import hashlib
import math

import pytest
import torch
from torch.distributions import Normal

from halfbyte.errors import WeightError
from halfbyte.quant import blockwise, storage_cost
from halfbyte.quant.codebooks import CODEBOOKS
from tests.quant.quant_oracle import look_up, same_bits

FORMATS = ("nf4", "fp4", "int8")


def _same(one: tuple[torch.Tensor, blockwise.QuantState], other: tuple[torch.Tensor, blockwise.QuantState]) -> bool:
    return same_bits(one[0], other[0]) and same_bits(blockwise.plain_absmax(one[1]), blockwise.plain_absmax(other[1]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("place", (0, 63, 64, 300, 69 * 70 - 1))
def test_non_finite_weights_are_refused(format: str, poison: float, place: int) -> None:
    """# T50: first, last, block edges and the last short block; the message names the tensor and counts."""
    weight = torch.randn(69, 70)
    weight.view(-1)[place] = poison
    with pytest.raises(WeightError) as caught:
        blockwise.quantize(weight, format, name="model.layers.0.q_proj.weight")
    assert "model.layers.0.q_proj.weight" in str(caught.value) and "1 of 4830 elements" in str(caught.value)


def test_values_beyond_float16_are_refused_for_int8_only() -> None:
    weight = torch.tensor([[1e6, 1.0]])
    with pytest.raises(WeightError, match="65504"):
        blockwise.quantize(weight, "int8")
    packed, state = blockwise.quantize(weight, "nf4")
    assert blockwise.dequantize(packed, state)[0, 0] == 1e6


@pytest.mark.parametrize("format", FORMATS)
def test_memory_layout_does_not_matter(format: str) -> None:
    """# T51: transposed, strided, expanded and offset views give what their contiguous copy gives."""
    base = torch.randn(96, 130)
    for view in (base.T, base[::2, 3:], base[:, ::3], base[5:6].expand(7, 130), base.flip(0), base[1:, 1:]):
        assert _same(blockwise.quantize(view, format), blockwise.quantize(view.contiguous().clone(), format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_row_blocks_give_the_bytes_of_the_whole(format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(130, 67).to(dtype)
    whole = blockwise.quantize(weight, format)
    monkeypatch.setattr(blockwise, "PIECE", 4096)
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")  # which is given the tensor in pieces
    assert _same(blockwise.quantize(weight, format), whole)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_round_trip_keeps_shape_dtype_and_accuracy(format: str, dtype: torch.dtype) -> None:
    for shape in ((33, 65), (1, 1), (64, 64)) if format == "int8" else ((33, 65), (7,), (2, 3, 5), (1,)):
        weight = torch.randn(shape).to(dtype)
        stored, state = blockwise.quantize(weight, format)
        back = blockwise.dequantize(stored, state)
        assert back.shape == weight.shape and back.dtype == dtype and state.numel == weight.numel()
        assert blockwise.dequantize(stored, state, torch.float32).dtype == torch.float32
        if weight.numel() > 1000:
            error = float((back - weight).float().norm() / weight.float().norm())
            assert error < {"nf4": 0.11, "fp4": 0.14, "int8": 0.01}[format]


def test_nested_scales_read_back_in_float32() -> None:
    """# T53: codebook[code] * absmax2 + offset, each step rounded in fp32, whatever the dtype of the weight."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _, state = blockwise.quantize(torch.randn(300, 64).to(dtype))
        nested = state.nested
        assert nested is not None and nested.offset.dtype == torch.float32 and nested.offset.shape == ()
        assert nested.absmax2.dtype == torch.float32 and state.absmax.dtype == torch.uint8
        scales = (nested.codebook[state.absmax.long()] * nested.absmax2.repeat_interleave(256)[:300]) + nested.offset
        assert same_bits(blockwise.plain_absmax(state), scales)
        packed, plain = blockwise.quantize(torch.randn(3, 64).to(dtype), double_quant=True)
        want = look_up(packed, blockwise.plain_absmax(plain), CODEBOOKS["nf4"], 64, 192, dtype)
        assert same_bits(blockwise.dequantize(packed, plain).reshape(-1), want)


def test_eight_bit_codes_are_the_nearest() -> None:
    from halfbyte.kernels.quantize_blockwise import quantize_blockwise

    for name in ("dynamic-signed", "dynamic-unsigned"):
        x = torch.randn(4096) if name == "dynamic-signed" else torch.rand(4096)
        x[::7] *= 1e-5
        indices, absmax = quantize_blockwise(x, CODEBOOKS[name], 256)
        scaled = x * (1 / absmax).repeat_interleave(256)
        nearest = (scaled[:, None] - CODEBOOKS[name]).abs().amin(1)
        torch.testing.assert_close((scaled - CODEBOOKS[name][indices.long()]).abs(), nearest, rtol=0, atol=1e-7)


def test_tables() -> None:
    """The published bytes, and NF4's own derivation from the normal distribution to within a float32 step."""
    starts = {"nf4": "8501941d", "fp4": "b830bcf8", "dynamic-signed": "e732639a", "dynamic-unsigned": "305f002c"}
    for name, start in starts.items():
        assert hashlib.sha256(CODEBOOKS[name].numpy().tobytes()).hexdigest().startswith(start)
    normal = Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    derived = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(CODEBOOKS["nf4"], (derived / derived.max()).float(), rtol=5e-7, atol=0)
    assert CODEBOOKS["fp4"][8].item() == 0 and not torch.signbit(CODEBOOKS["fp4"][8])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", (False, True))
def test_storage_cost_is_exact(format: str, double_quant: bool) -> None:
    for shape in ((64, 64), (33, 65), (1, 1), (300, 257)):
        stored, state = blockwise.quantize(torch.randn(shape), format, 64, double_quant)
        parts = [stored, state.absmax, state.codebook]
        if state.nested:
            parts += [state.nested.absmax2, state.nested.codebook, state.nested.offset]
        assert storage_cost.bytes_of(shape, format, 64, double_quant) == sum(part.numel() * part.element_size() for part in parts)


def test_wrong_settings_are_refused() -> None:
    for arguments in (("nf5", 64), ("nf4", 48)):
        with pytest.raises(ValueError):
            blockwise.quantize(torch.randn(4, 64), *arguments)
    with pytest.raises(ValueError, match="int8 holds"):
        blockwise.quantize(torch.randn(64), "int8")
    with pytest.raises(WeightError, match="empty"):
        blockwise.quantize(torch.empty(0, 4))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("double_quant", (False, True))
def test_a_stack_has_the_bytes_of_its_weights(dtype: torch.dtype, double_quant: bool) -> None:
    weights = torch.randn(3, 40, 64).to(dtype)
    packed, absmax, absmax2, offset = blockwise.quantize_stack(weights, "nf4", 64, double_quant)
    for expert in range(3):
        want, state = blockwise.quantize(weights[expert], "nf4", 64, double_quant)
        assert same_bits(packed[expert], want) and same_bits(absmax[expert], state.absmax)
        assert (state.nested is None) is (absmax2 is None) is (offset is None)
        if state.nested is not None and absmax2 is not None and offset is not None:
            assert same_bits(absmax2[expert], state.nested.absmax2) and same_bits(offset[expert], state.nested.offset)
    weights[1, 3, 5] = torch.inf
    with pytest.raises(WeightError, match="tensor b"):
        blockwise.quantize_stack(weights, "nf4", 64, double_quant, ["a", "b", "c"])
    with pytest.raises(ValueError, match="whole blocks"):
        blockwise.quantize_stack(weights[:, :, :63], "nf4", 128)
