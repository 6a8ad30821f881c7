"""What is no number stays no number when a CPU kernel rounds it to bfloat16, whatever its other bits are.

A NaN has 2^23 - 1 bit patterns of either sign; rounding their bits up ends at infinity for some and at -0 for others.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise
from halfbyte.kernels.gated_mlp import gated_act, gated_act_backward
from halfbyte.kernels.linear_cross_entropy import cpu as cross_entropy
from halfbyte.kernels.matmul_4bit import matmul_4bit
from halfbyte.kernels.native import load, native, store
from halfbyte.kernels.packed_attention import packed_attention_backward
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from halfbyte.kernels.rope import rope
from halfbyte.quant.codebooks import CODEBOOKS

# signalling and quiet, payload in the half that is cut off, in the other, in both, all ones
PAYLOADS = (0x7F800001, 0x7F807FFF, 0x7F808000, 0x7F810000, 0x7FBFFFFF, 0x7FC00000, 0x7FC00001, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF)
BITS = [*PAYLOADS, *(bits | 0x80000000 for bits in PAYLOADS)]
H = 40  # two whole vectors and a rest


def full(bits: int, *shape: int) -> Tensor:
    """float32 NaN with these bits."""
    return torch.full(shape, bits - (1 << 32) if bits >> 31 else bits, dtype=torch.int32).view(torch.float32)


def short(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def upper(nan: Tensor) -> Tensor:
    """The bfloat16 of the upper half of the bits, kept from being infinity."""
    return (nan.view(torch.int32).bitwise_right_shift(16) | 1).to(torch.int16).view(torch.bfloat16)


def attention(nan: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    q, k, v, do, o = (short(9, 2, 16) for _ in range(5))
    return packed_attention_backward(do, q, k, v, o, nan(2, 9), torch.tensor([0, 9], dtype=torch.int32), 0.25)


def logits(nan: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    z = short(3, H)
    z[:, 7] = upper(nan(3))
    loss = cross_entropy.cross_entropy_(z, torch.tensor([0, 7, 39]), None, 1.0, True)
    return loss, z


def few_rows(nan: Callable[..., Tensor], columns: int) -> Tensor:
    packed = torch.full((columns,), 0x3C, dtype=torch.uint8)
    return matmul_4bit(short(3, columns), packed, nan(-(-2 * columns // 64)), CODEBOOKS["nf4"], 64, (2, columns), torch.bfloat16)


FAMILIES: dict[str, Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]] = {
    "rms_norm": lambda nan: tuple(rms_norm(short(3, H), nan(H), 1e-5, form)[0] for form in (0, 1, 2)),
    "add_rms_norm": lambda nan: tuple(add_rms_norm(short(3, H), short(3, H), nan(H), 1e-5, form)[1] for form in (0, 1, 2)),
    "rms_norm_backward": lambda nan: (rms_norm_backward(short(3, H), short(3, H), torch.ones(H), nan(3), 0),),
    "rope": lambda nan: tuple(rope(short(3, 2, H), nan(3, H), nan(3, H), inverse) for inverse in (False, True)),
    "gated_mlp": lambda nan: (
        gated_act(upper(nan(3, H)), short(3, H), "silu"),
        *gated_act_backward(upper(nan(3, H)), short(3, H), short(3, H), "gelu")[1:],
    ),
    "linear_cross_entropy": logits,
    "packed_attention": attention,
    "matmul_4bit, odd rows": lambda nan: (few_rows(nan, 70),),
    "matmul_4bit, whole vectors": lambda nan: (few_rows(nan, 128),),
    "dequantize_blockwise": lambda nan: tuple(
        dequantize_blockwise(torch.full((90,), 0x3C, dtype=torch.uint8), nan(3), CODEBOOKS["nf4"], 64, count, torch.bfloat16)
        for count in (180, 179)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_nan_stays_nan(family: str) -> None:
    """T42: in each kernel family that writes bfloat16, for each kind of payload and both signs."""
    for bits in BITS:
        for number, result in enumerate(FAMILIES[family](lambda *shape, bits=bits: full(bits, *shape))):
            assert bool(result.isnan().all()), f"result {number} of NaN {bits:#x}"


def test_a_stored_nan_is_the_one_torch_makes() -> None:
    """T42: rounded bits of a NaN may be infinity or -0; it is written as 0x7FC0 instead, alone and in vector code."""

    @native("x: f32*, y: bf16*")
    def narrowed(x, y, first, last):  # type: ignore[no-untyped-def]
        for i in range(first, last):
            store(y, i, load(x, i))

    every = torch.cat([full(bits, 1) for bits in BITS])
    for nan in (every, every[:1], every[9:10]):
        y = torch.empty(len(nan), dtype=torch.bfloat16)
        narrowed(len(nan), nan, y)
        assert (y.view(torch.int16) == 0x7FC0).all()
