"""quantize_blockwise and dequantize_blockwise: the CPU kernels against the reference and a NumPy oracle, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte.kernels.dequantize_blockwise import cpu as read_cpu
from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise, dequantize_into
from halfbyte.kernels.dequantize_blockwise import reference as read_reference
from halfbyte.kernels.quantize_blockwise import cpu as write_cpu
from halfbyte.kernels.quantize_blockwise import quantize_blockwise
from halfbyte.kernels.quantize_blockwise import reference as write_reference
from halfbyte.quant.codebooks import CODEBOOKS
from tests.kernels.blockwise_checks import FLOATS, SIZES, nested_scales, reads_back, writes
from tests.quant.quant_oracle import look_up, ranks, same_bits


def _packed_indices(packed: torch.Tensor, numel: int) -> np.ndarray:
    return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[:numel].numpy()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("blocksize", (2, 32, 64, 70, 256, 4096))
def test_cpu_quantize_equals_reference(dtype: torch.dtype, name: str, blocksize: int) -> None:
    for size in SIZES:
        writes(dtype, name, blocksize, size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("nested", (False, True))
def test_cpu_dequantize_equals_reference(dtype: torch.dtype, name: str, nested: bool) -> None:
    """# T53, T57: every fast path gives the bits of the one decoder, FP4's unsorted table and nested scales included."""
    for blocksize in (2, 32, 64, 70, 128, 4096):
        for size in SIZES:
            reads_back(dtype, name, blocksize, size, nested)


@pytest.mark.parametrize("processor", ("haswell", "x86-64"))
def test_other_instruction_sets_give_the_same_bits(processor: str, tmp_path: Path) -> None:
    """# T57: the AVX2 and the plain paths, made and run by a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.blockwise_checks"], capture_output=True, text=True,
        env={**os.environ, "NUMBA_CPU_NAME": processor, "HALFBYTE_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == [{"haswell": "avx2", "x86-64": "plain"}[processor]], done.stderr


def test_nested_scales_are_rounded_twice() -> None:
    """# T53: product and sum each rounded, as bitsandbytes does; a fused multiplication and addition has other bits."""
    absmax, (absmax2, levels, offset) = nested_scales(5000)
    product = levels.double()[absmax.long()] * absmax2.double().repeat_interleave(256)[:5000]
    twice, once = product.float() + offset, (product + offset.double()).float()
    assert not torch.equal(twice, once)
    stored, codebook = torch.full((5000,), 255, dtype=torch.uint8), torch.ones(256)
    got = dequantize_blockwise(stored, absmax, codebook, 1, 5000, torch.float32, (absmax2, levels, offset))
    assert same_bits(got, twice)
    ones = torch.ones(16)
    packed = torch.zeros(5000 * 16, dtype=torch.uint8)
    assert same_bits(dequantize_blockwise(packed, absmax, ones, 32, 5000 * 32, torch.float32, (absmax2, levels, offset))[::32], twice)


def test_into_a_buffer_that_is_there() -> None:
    packed, absmax = quantize_blockwise(torch.randn(200), CODEBOOKS["nf4"], 64)
    for dtype in (*FLOATS, torch.float64):
        out = torch.full((10, 20), torch.nan, dtype=dtype)
        assert dequantize_into(out, packed, absmax, CODEBOOKS["nf4"], 64) is out
        assert same_bits(out.view(-1), dequantize_blockwise(packed, absmax, CODEBOOKS["nf4"], 64, 200, dtype))
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_into(out.T, packed, absmax, CODEBOOKS["nf4"], 64)


def test_a_scale_that_is_not_a_number_is_read_back_as_one() -> None:
    """NaN of every bit pattern, whose rounding to bfloat16 must not carry into the sign."""
    absmax = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    packed = torch.zeros(96, dtype=torch.uint8)
    for dtype in FLOATS:
        back = dequantize_blockwise(packed[:90], absmax, CODEBOOKS["nf4"], 64, 180, dtype)
        assert back.isnan().all()


def test_dequantize_equals_look_up_in_numpy() -> None:
    """# T57: the reference itself against an oracle that shares no code with it."""
    for name in ("nf4", "fp4"):
        for size in (1, 64, 65, 333):
            packed = torch.randint(0, 256, ((size + 1) // 2,), dtype=torch.uint8)
            absmax = torch.rand(-(-size // 64))
            for dtype in FLOATS:
                want = look_up(packed, absmax, CODEBOOKS[name], 64, size, dtype)
                assert same_bits(read_reference.dequantize_blockwise(packed, absmax, CODEBOOKS[name], 64, size, dtype), want)
                assert same_bits(dequantize_blockwise(packed, absmax, CODEBOOKS[name], 64, size, dtype), want)


def test_codes_equal_numpy_oracle() -> None:
    """# T48: codes bit by bit against a plain loop, for every block size, where a tolerance would let a packing bug through."""
    for blocksize in (32, 64, 512, 4096):
        for name in ("nf4", "fp4", "dynamic-signed"):
            x = torch.randn(2 * blocksize + 7 if blocksize < 1000 else blocksize + 7)
            stored, absmax = quantize_blockwise(x, CODEBOOKS[name], blocksize)
            want, scales = ranks(x.numpy(), CODEBOOKS[name].numpy(), blocksize)
            got = _packed_indices(stored, len(x)) if CODEBOOKS[name].numel() == 16 else stored.numpy()
            assert np.array_equal(got, want) and np.array_equal(absmax.numpy(), scales), (name, blocksize)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_size_stays_inside_its_buffers(dtype: torch.dtype) -> None:
    """# T47: numel 1..300 (every residue mod 64): right codes, right last scale, nothing written outside the buffers."""
    codebook = CODEBOOKS["nf4"]
    thresholds, order, numbers = write_cpu._tables(tuple(codebook.tolist()))
    whole = torch.randn(300).to(dtype)
    for size in range(1, 301):
        wide_packed, wide_absmax = torch.full((250,), 0xA5, dtype=torch.uint8), torch.full((20,), torch.nan)
        blocks, stored = -(-size // 64), (size + 1) // 2
        packed, absmax = wide_packed[50 : 50 + stored], wide_absmax[5 : 5 + blocks]
        write_cpu.pack(blocks, whole[:size], thresholds, order, numbers, 64, size, 0, packed, absmax)
        want, scales = ranks(whole[:size].float().numpy(), codebook.numpy(), 64)
        assert np.array_equal(_packed_indices(packed, size), want), size
        assert np.array_equal(absmax.numpy(), scales), size
        assert (wide_packed[:50] == 0xA5).all() and (wide_packed[50 + stored :] == 0xA5).all(), size
        assert wide_absmax[:5].isnan().all() and wide_absmax[5 + blocks :].isnan().all(), size
        wide_out = torch.full((400,), torch.nan, dtype=dtype)
        out = wide_out[50 : 50 + size]
        dequantize_into(out, packed.clone(), absmax.clone(), codebook, 64)
        assert same_bits(out, torch.from_numpy(codebook.numpy()[want] * np.repeat(scales, 64)[:size]).to(dtype))
        assert wide_out[:50].isnan().all() and wide_out[50 + size :].isnan().all(), size


def test_zero_and_denormal_blocks() -> None:
    """# T49: a block of zeros has scale 0 and reads back as zeros; denormal blocks stay finite; neighbours are untouched."""
    for dtype in (torch.float32, torch.bfloat16):
        for tiny in (0.0, 1e-42, -1e-40, 1e-38):
            x = torch.randn(192).to(dtype)
            x[64:128] = tiny
            for run in (write_cpu, write_reference):
                packed, absmax = run.quantize_blockwise(x, CODEBOOKS["nf4"], 64)
                back = read_reference.dequantize_blockwise(packed, absmax, CODEBOOKS["nf4"], 64, 192, torch.float32)
                assert torch.isfinite(back).all() and torch.isfinite(absmax).all()
                assert (back[64:128].abs() <= abs(tiny) * 1.01).all()
                assert absmax[1] == x[64:128].float().abs().max()
                alone = run.quantize_blockwise(x[128:], CODEBOOKS["nf4"], 64)
                assert same_bits(packed[64:], alone[0])
    for run in (write_cpu, write_reference):
        packed, _ = run.quantize_blockwise(torch.zeros(64), CODEBOOKS["nf4"], 64)
        assert (packed == 0x77).all()


def test_offsets_beyond_two_to_the_31() -> None:
    """# T52: the last blocks of a tensor of more than 2^31 elements, whose pages are never touched elsewhere.

    In a child process, for a wrong offset lies outside the tensor and ends it.
    """
    child = os.fork()
    if child == 0:
        try:
            _last_blocks()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _last_blocks() -> None:
    codebook, blocks = CODEBOOKS["nf4"], 2**31 // 64 + 3
    numel = blocks * 64
    thresholds, order, numbers = write_cpu._tables(tuple(codebook.tolist()))
    x, packed, absmax = torch.empty(numel, dtype=torch.bfloat16), torch.empty(numel // 2, dtype=torch.uint8), torch.empty(blocks)
    x[-128:] = tail = torch.randn(128).to(torch.bfloat16)
    write_cpu.pack(2, x, thresholds, order, numbers, 64, numel, blocks - 2, packed, absmax, work=128)
    want, scales = write_reference.quantize_blockwise(tail, codebook, 64)
    assert torch.equal(packed[-64:], want) and torch.equal(absmax[-2:], scales)
    back = read_reference.dequantize_blockwise(want, scales, codebook, 64, 128, torch.float32)
    out = torch.zeros(128)
    for blocksize in (64, 32):  # a path of its own, and the one for all others
        scales = read_cpu.scale_arguments(absmax.repeat_interleave(64 // blocksize) if blocksize == 32 else absmax, None)
        first = (blocks - 2) * 64 // blocksize
        read_cpu.unpack(128 // blocksize, packed, *scales, codebook, blocksize, numel, first, out.zero_(), work=128)
        assert torch.equal(out, back)


def test_bfloat16_rounds_to_nearest_even() -> None:
    """In vectors (blocks of 32) and one by one (blocks of 2)."""
    exact = torch.arange(0x3F80_0000, 0x3F80_0000 + 0x4_0000, 0x1000, dtype=torch.int32)
    values = torch.cat([exact.view(torch.float32), torch.tensor([0.0, -0.0, 1e-40, 3.3e38, float("inf")])])
    for blocksize in (2, 32):
        packed = torch.zeros(len(values) * blocksize // 2, dtype=torch.uint8)
        got = dequantize_blockwise(packed, values, torch.ones(16), blocksize, len(values) * blocksize, torch.bfloat16)
        assert same_bits(got[::blocksize], values.to(torch.bfloat16))


def test_halves_round_to_even_on_every_path() -> None:
    """# T57: products that lie exactly between two bfloat16 values, which random numbers hardly ever do."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(2)
    codebook = torch.linspace(-1, 1, 17)[1:].contiguous()  # multiples of 1/8
    absmax = torch.tensor([1 + (2 * odd + 1) / 256 for odd in range(16)])
    arguments = (packed, absmax, codebook, 64, 1024, torch.bfloat16)
    want = read_reference.dequantize_blockwise(*arguments)
    assert same_bits(read_cpu.dequantize_blockwise(*arguments), want)
    pairs = (packed, absmax.repeat_interleave(32), codebook, 2, 1024, torch.bfloat16)
    assert same_bits(read_cpu.dequantize_blockwise(*pairs), want)


def test_threads_and_fork_give_the_same_bits() -> None:
    x = torch.randn(1 << 20)
    codebook = CODEBOOKS["nf4"]
    want = quantize_blockwise(x, codebook, 64)
    torch.set_num_threads(3)
    try:
        got = quantize_blockwise(x, codebook, 64)
        back = dequantize_blockwise(*got, codebook, 64, x.numel(), torch.bfloat16)
    finally:
        torch.set_num_threads(1)
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    assert same_bits(back, read_reference.dequantize_blockwise(*want, codebook, 64, x.numel(), torch.bfloat16))
    child = os.fork()
    if child == 0:
        again = dequantize_blockwise(*want, codebook, 64, x.numel(), torch.bfloat16)
        os._exit(0 if same_bits(again, back) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_opcheck() -> None:
    codebook = CODEBOOKS["nf4"]
    x = torch.randn(100)
    packed, absmax = quantize_blockwise(x, codebook, 64)
    torch.library.opcheck(torch.ops.halfbyte.quantize_blockwise, (x, codebook, 64))
    torch.library.opcheck(torch.ops.halfbyte.quantize_blockwise, (x, CODEBOOKS["dynamic-signed"], 256))
    torch.library.opcheck(torch.ops.halfbyte.dequantize_blockwise, (packed, absmax, codebook, 64, 100, torch.bfloat16))
    codes, nested = nested_scales(2)
    torch.library.opcheck(torch.ops.halfbyte.dequantize_blockwise, (packed, codes, codebook, 64, 100, torch.bfloat16, *nested))


def test_wrong_arguments_are_refused() -> None:
    codebook, packed, absmax = CODEBOOKS["nf4"], torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    for call in (
        lambda: quantize_blockwise(torch.zeros(4, dtype=torch.int32), codebook, 64),
        lambda: quantize_blockwise(torch.zeros(4), codebook[:7], 64),
        lambda: quantize_blockwise(torch.zeros(4), codebook, 63),
        lambda: dequantize_blockwise(packed, absmax, codebook, 64, 66, torch.float32),
        lambda: dequantize_blockwise(packed.float(), absmax, codebook, 64, 64, torch.float32),
        lambda: dequantize_blockwise(packed, absmax.half(), codebook, 64, 64, torch.float32),
        lambda: dequantize_blockwise(packed, torch.zeros(2), codebook, 64, 64, torch.float32),
        lambda: dequantize_blockwise(packed, absmax, codebook, 64, 64, torch.float32, nested_scales(1)[1]),
        lambda: dequantize_blockwise(packed, absmax.byte(), codebook, 64, 64, torch.float32, nested_scales(300)[1]),
        lambda: dequantize_blockwise(packed, absmax.byte(), codebook, 64, 64, torch.float32, (absmax, absmax, absmax)),
        lambda: torch.ops.halfbyte.dequantize_blockwise(packed, absmax.byte(), codebook, 64, 64, torch.float32, absmax),
    ):
        with pytest.raises(ValueError):
            call()
