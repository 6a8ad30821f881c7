"""What Triton's compiler makes of the kernels for an H100 (compute capability 90); no GPU is needed.  Run by test_kernels_triton.py.

The interpreter takes code that the compiler refuses, never fuses a product with a sum, and says nothing of how memory is read.
"""

import re
from functools import partial

import pytest
import torch

from halfbyte.kernels.adamw import triton_gpu as adam
from halfbyte.kernels.dequantize_blockwise import triton_gpu as read
from halfbyte.kernels.gated_mlp import ACTS
from halfbyte.kernels.gated_mlp import triton_gpu as gated
from halfbyte.kernels.linear_cross_entropy import triton_gpu as loss
from halfbyte.kernels.matmul_4bit import triton_gpu as product
from halfbyte.kernels.quantize_blockwise import triton_gpu as write
from halfbyte.kernels.rms_norm import triton_gpu as norm
from halfbyte.kernels.rope import triton_gpu as rope
from halfbyte.quant.codebooks import CODEBOOKS
from tests.kernels.triton_compiled import Compiled, compile_call

COUNT = 64 * 4096
NESTED = (torch.zeros(16), torch.zeros(256), torch.zeros(()))
PACKED, INDICES = torch.zeros(COUNT // 2, dtype=torch.uint8), torch.zeros(COUNT // 64, dtype=torch.uint8)
FUSED = r"\b(fma|mad)\.\S*f32"
WIDE_READ, WIDE_WRITE = r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32"  # 16 bytes a thread


def _zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _moves_16_bytes(made: list[Compiled]) -> None:
    for kernel in made:
        assert kernel.has(WIDE_READ) and kernel.has(WIDE_WRITE), kernel.name
        assert kernel.spilled_bytes == 0, kernel.name


def test_dequantize_is_not_fused_and_moves_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """# T53: absmax = level * absmax2 + offset stays a product and a sum, and bf16 is rounded to nearest even."""
    for dtype in (torch.bfloat16, torch.float32):
        call = partial(read.dequantize_blockwise, PACKED, INDICES, CODEBOOKS["nf4"], 64, COUNT, dtype, NESTED)
        made = compile_call(monkeypatch, read, call)
        assert made[0].has(r"mul\.rn\.f32") and made[0].has(r"add\.rn\.f32") and not made[0].has(FUSED)
        assert dtype != torch.bfloat16 or made[0].has(r"cvt\.rn\.bf16x2\.f32")
        _moves_16_bytes(made)


def test_quantize_divides_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """# T48: an approximate quotient would move elements that lie on a threshold."""
    for name, blocksize in (("nf4", 64), ("dynamic-signed", 256)):
        (made,) = compile_call(monkeypatch, write, partial(write.quantize_blockwise, _zeros(COUNT), CODEBOOKS[name], blocksize))
        assert made.has(r"div\.rn\.f32") and not made.has(r"div\.(full|approx)") and not made.has(FUSED)
        assert made.has(WIDE_READ)


def test_few_rows_read_16_packed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 4):
        call = partial(product.matmul_4bit, _zeros(rows, 4096), PACKED, INDICES, CODEBOOKS["nf4"], 64, (64, 4096), torch.bfloat16, NESTED)
        (made,) = compile_call(monkeypatch, product, call)
        assert made.has(WIDE_READ) and made.spilled_bytes == 0


def test_rows_are_read_and_written_16_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, rstd = _zeros(64, 4096), _zeros(4096), _zeros(64, dtype=torch.float32)
    _moves_16_bytes(compile_call(monkeypatch, norm, partial(norm.add_rms_norm, x, x, weight, 1e-5, 0)))
    _moves_16_bytes(compile_call(monkeypatch, norm, partial(norm.rms_norm_backward, x, x, weight, rstd, 2, x)))
    _moves_16_bytes(compile_call(monkeypatch, norm, partial(norm.rms_norm_weight_grad, x, x, rstd, 1)))
    heads, angles = _zeros(64, 32, 128), _zeros(64, 128, dtype=torch.float32)
    _moves_16_bytes(compile_call(monkeypatch, rope, partial(rope.rope_, heads, angles, angles)))
    _moves_16_bytes(compile_call(monkeypatch, rope, partial(rope.rope, heads, angles[:, :64], angles[:, :64], True)))
    for act in ACTS:
        _moves_16_bytes(compile_call(monkeypatch, gated, partial(gated.gated_act_backward, x, x, x, act)))
    z, labels = _zeros(4, 128256), _zeros(4, dtype=torch.int64)
    for softcap in (None, 30.0):
        _moves_16_bytes(compile_call(monkeypatch, loss, partial(loss.cross_entropy_, z, labels, softcap, 1.0, True)))


def test_adamw_moves_16_bytes_and_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits the moments are 4 bytes of a thread that holds 4 parameters."""
    p, grad, numbers = _zeros(COUNT, dtype=torch.float32), _zeros(COUNT), (1e-2, 0.9, 0.999, 1e-8, 0.1, 1)
    made = compile_call(monkeypatch, adam, partial(adam.adamw_, p, grad, p, p, *numbers))
    indices, absmax, book = _zeros(COUNT, dtype=torch.uint8), _zeros(COUNT // 256, dtype=torch.float32), CODEBOOKS["dynamic-signed"]
    state = indices, absmax, indices, absmax, book, book
    made += compile_call(monkeypatch, adam, partial(adam.adamw_int8_, p, grad, *state, *numbers))
    _moves_16_bytes(made)
    for kernel in made:
        assert kernel.has(r"div\.rn\.f32") and kernel.has(r"sqrt\.rn\.f32") and not kernel.has(FUSED)


def test_an_older_gpu_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 80 (A100)."""
    call = partial(read.dequantize_blockwise, PACKED, INDICES, CODEBOOKS["nf4"], 64, COUNT, torch.bfloat16, NESTED)
    (made,) = compile_call(monkeypatch, read, call, 80)
    assert re.search(r"\.target sm_80", made.ptx) and not made.has(FUSED)
    compile_call(monkeypatch, loss, partial(loss.cross_entropy_, _zeros(4, 4096), _zeros(4, dtype=torch.int64), None, 1.0, True), 80)
