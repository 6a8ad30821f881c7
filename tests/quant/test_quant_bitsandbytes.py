"""Our packed bytes, scales and dense values against bitsandbytes', to the bit, over thousands of random tensors.

bitsandbytes' CPU dequantize is wrong where the last size is no multiple of the block size, so there the oracle is a table look-up;
its packing of the same tensors is right.  Its 8-bit blockwise CPU kernel is not nearest (a table of 65,536 bins), ours is; so nested
codes may differ in up to 0.5 % of cases, and must then be the nearer ones.
"""

import random

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Int8Params

from halfbyte.quant import blockwise
from halfbyte.quant.codebooks import CODEBOOKS
from tests.quant.quant_oracle import look_up, same_bits

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _shapes(count: int, seed: int) -> list[tuple[int, ...]]:
    """Every numel 1..300 as a vector, then 1-D to 3-D shapes of mixed parity."""
    draw = random.Random(seed)
    shapes: list[tuple[int, ...]] = [(size,) for size in range(1, 301)]
    while len(shapes) < count:
        rank = draw.choice((1, 2, 2, 3))
        most = {1: 3000, 2: 60, 3: 14}[rank]
        shapes.append(tuple(draw.randint(1, most) for _ in range(rank)))
    return shapes


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, draw: random.Random) -> torch.Tensor:
    weight = torch.randn(shape) * 10.0 ** draw.uniform(-5, 3)
    kind = draw.randrange(6)
    if kind == 0:
        weight.view(-1)[:: draw.randint(2, 9)] = 0
    elif kind == 1:
        weight = weight.abs()
    elif kind == 2:
        weight = weight.round(decimals=1)
    return weight.to(dtype)


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_bytes_and_absmax_equal(format: str, dtype: torch.dtype) -> None:
    """# T47, T48: 600 tensors for each of 6 combinations, 3,600 in all; all residues mod 64, odd counts, four block sizes."""
    draw = random.Random(f"{format} {dtype}")
    residues = set()
    for number, shape in enumerate(_shapes(600, seed=number_of(dtype))):
        weight = _tensor(shape, dtype, draw)
        blocksize = (64, 64, 64, 128, 32, 256)[number % 6]
        packed, state = blockwise.quantize(weight, format, blocksize, double_quant=False)
        want, theirs = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=format)
        assert same_bits(packed, want.reshape(-1)), (shape, blocksize)
        assert same_bits(state.absmax, theirs.absmax), (shape, blocksize)
        residues.add(weight.numel() % 64)
    assert len(residues) == 64


def number_of(dtype: torch.dtype) -> int:
    return FLOATS.index(dtype)


@pytest.mark.parametrize("format", ("nf4", "fp4"))
def test_double_quantization_equals(format: str) -> None:
    """# T53: offset and second-level scales to the bit; codes within 0.5 %, and ours nearer where they differ."""
    draw, differing, total = random.Random(format), 0, 0
    codebook = CODEBOOKS["dynamic-signed"]
    for dtype in FLOATS:
        for shape in [*_shapes(340, seed=7)[300:], (700, 65), (128, 512), (256, 768)]:
            weight = (torch.randn(shape) * 10.0 ** draw.uniform(-3, 1)).to(dtype)
            packed, state = blockwise.quantize(weight, format, 64, double_quant=True)
            want, theirs = bnb.quantize_4bit(weight, quant_type=format, compress_statistics=True)
            assert state.nested is not None and same_bits(packed, want.reshape(-1))
            assert same_bits(state.nested.offset, theirs.offset) and same_bits(state.nested.absmax2, theirs.state2.absmax)
            assert same_bits(state.nested.codebook, theirs.state2.code) and state.nested.blocksize == theirs.state2.blocksize
            plain = blockwise.quantize(weight, format, 64, double_quant=False)[1].absmax - state.nested.offset
            scaled = plain / state.nested.absmax2.repeat_interleave(256)[: len(plain)].clamp(min=1e-38)
            unequal = state.absmax != theirs.absmax
            ours, other = ((codebook[codes[unequal].long()] - scaled[unequal]).abs() for codes in (state.absmax, theirs.absmax))
            assert (ours <= other * (1 + 1e-5)).all()
            differing, total = differing + int(unequal.sum()), total + unequal.numel()
    assert total > 3000 and differing <= 0.005 * total, (differing, total)


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("double_quant", (False, True))
def test_dequantize_equals(format: str, double_quant: bool) -> None:
    """# T53, T57: dense values to the bit where bitsandbytes is right, by look-up where its blocks cross rows."""
    draw = random.Random(1)
    for dtype in FLOATS:
        for shape in ((8, 64), (3, 128), (64,), (2, 5, 64), (33, 192), (64, 96), (36, 208), (7, 13), (65,), (5,), (3, 5, 7)):
            weight = _tensor(shape, dtype, draw)
            theirs, their_state = bnb.quantize_4bit(weight, quant_type=format, compress_statistics=double_quant)
            nested = None
            if double_quant:
                second = their_state.state2
                nested = blockwise.Nested(second.absmax, second.code, their_state.offset)
            state = blockwise.QuantState(format, their_state.code, their_state.absmax, 64, shape, dtype, nested)
            got = blockwise.dequantize(theirs.reshape(-1), state)
            absmax = their_state.absmax
            if double_quant:
                absmax = bnb.dequantize_blockwise(absmax, their_state.state2) + their_state.offset
            assert same_bits(blockwise.plain_absmax(state), absmax)
            oracle = look_up(theirs.reshape(-1), absmax, their_state.code, 64, weight.numel(), dtype).view(shape)
            assert same_bits(got, oracle), (shape, dtype)
            if shape[-1] % 64 == 0:
                assert same_bits(got, bnb.dequantize_4bit(theirs, their_state).view(shape)), (shape, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_rows_equal(dtype: torch.dtype) -> None:
    """LLM.int8(): bytes, scales and dense values, weights through float16 first."""
    draw = random.Random(str(dtype))
    for _ in range(150):
        weight = (torch.randn(draw.randint(1, 40), draw.randint(1, 90)) * 10.0 ** draw.uniform(-3, 2)).to(dtype)
        stored, state = blockwise.quantize(weight, "int8")
        theirs = Int8Params(weight.clone(), requires_grad=False)._quantize("cpu")
        assert same_bits(stored, theirs.CB) and same_bits(state.absmax, theirs.SCB)
        assert same_bits(blockwise.dequantize(stored, state, torch.float32), bnb.int8_vectorwise_dequant(theirs.CB, theirs.SCB))


def test_zero_rows_and_blocks_equal() -> None:
    """# T49: whole blocks of zeros, a tail of zeros, rows of zeros."""
    for shape in ((4, 64), (3, 70), (5,), (1, 1)):
        weight = torch.randn(shape)
        weight[:1] = 0
        for format in ("nf4", "fp4"):
            packed, state = blockwise.quantize(weight, format, double_quant=False)
            want, theirs = bnb.quantize_4bit(weight, quant_type=format)
            assert same_bits(packed, want.reshape(-1)) and same_bits(state.absmax, theirs.absmax)
            assert (blockwise.dequantize(packed, state)[:1] == 0).all()
    stored, state = blockwise.quantize(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), "int8")
    assert stored.tolist() == [[0, 0], [64, -127]] and state.absmax.tolist() == [0.0, 2.0]
