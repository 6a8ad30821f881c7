"""quantize_blockwise and dequantize_blockwise: the CPU kernels against the reference and a NumPy oracle, to the bit."""

import os

import numpy as np
import pytest
import torch

from halfbyte.kernels.dequantize_blockwise import avx512, dequantize_blockwise
from halfbyte.kernels.dequantize_blockwise import cpu as read_cpu
from halfbyte.kernels.dequantize_blockwise import reference as read_reference
from halfbyte.kernels.quantize_blockwise import cpu as write_cpu
from halfbyte.kernels.quantize_blockwise import quantize_blockwise
from halfbyte.kernels.quantize_blockwise import reference as write_reference
from halfbyte.quant.codebooks import CODEBOOKS
from tests.quant.quant_oracle import look_up, ranks, same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 31, 32, 33, 63, 64, 65, 127, 191, 300, 4096, 5001)


def _packed_indices(packed: torch.Tensor, numel: int) -> np.ndarray:
    return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[:numel].numpy()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("blocksize", (32, 64, 256, 4096))
def test_cpu_quantize_equals_reference(dtype: torch.dtype, name: str, blocksize: int) -> None:
    for size in SIZES:
        x = (torch.randn(size) * 10.0 ** torch.randint(-6, 6, ())).clamp(-6e4, 6e4).to(dtype)
        got, want = (run(x, CODEBOOKS[name], blocksize) for run in (write_cpu.quantize_blockwise, write_reference.quantize_blockwise))
        assert same_bits(got[0], want[0]) and same_bits(got[1], want[1]), (size, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("portable", (True, False))
def test_cpu_dequantize_equals_reference(dtype: torch.dtype, name: str, portable: bool) -> None:
    """# T57: every fast path gives the bits of the one decoder, FP4's unsorted table included."""
    if not portable and avx512.missing():
        pytest.skip(avx512.missing())
    for blocksize in (32, 64, 128, 4096):
        for size in SIZES:
            stored = torch.randint(0, 256, ((size + 1) // 2 if CODEBOOKS[name].numel() == 16 else size,), dtype=torch.uint8)
            absmax = torch.rand(-(-size // blocksize)) * 10.0 ** torch.randint(-6, 4, ())
            arguments = (stored, absmax, CODEBOOKS[name], blocksize, size, dtype)
            assert same_bits(
                read_cpu.dequantize_blockwise(*arguments, portable=portable), read_reference.dequantize_blockwise(*arguments)
            ), (size, blocksize)


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
    small, _, _, pairs = write_cpu._tables(tuple(codebook.tolist()))
    whole = torch.randn(300).to(dtype)
    as_bits = whole.view(torch.uint16 if dtype == torch.bfloat16 else torch.uint32).numpy()
    value_of, mask = (write_cpu.widen, np.uint16(0x7FFF)) if dtype == torch.bfloat16 else (write_cpu._float32, np.uint32(0x7FFFFFFF))
    for size in range(1, 301):
        wide_packed, wide_absmax = np.full(250, 0xA5, np.uint8), np.full(20, np.nan, np.float32)
        blocks, stored = -(-size // 64), (size + 1) // 2
        packed = wide_packed[50 : 50 + stored]
        absmax = wide_absmax[5 : 5 + blocks]
        write_cpu.pack_range(as_bits[:size], mask, value_of, small, pairs, 64, 0, blocks, packed, absmax)
        want, scales = ranks(whole[:size].float().numpy(), codebook.numpy(), 64)
        assert np.array_equal(_packed_indices(torch.from_numpy(packed.copy()), size), want), size
        assert np.array_equal(absmax, scales), size
        assert (wide_packed[:50] == 0xA5).all() and (wide_packed[50 + stored :] == 0xA5).all(), size
        assert np.isnan(wide_absmax[:5]).all() and np.isnan(wide_absmax[5 + blocks :]).all(), size
        wide_out = torch.full((400,), torch.nan)
        wide_out[50 : 50 + size] = dequantize_blockwise(
            torch.from_numpy(packed.copy()), torch.from_numpy(absmax.copy()), codebook, 64, size, torch.float32
        )
        read_cpu.unpack_range(
            packed, absmax, tuple(codebook.numpy()), read_cpu._as_it_is, 64, 0, blocks, size, wide_out[50 : 50 + size].numpy()
        )
        assert same_bits(wide_out[50 : 50 + size], torch.from_numpy(codebook.numpy()[want] * np.repeat(scales, 64)[:size]))
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
    """# T52: the last blocks of a tensor of more than 2^31 elements, whose pages are never touched elsewhere."""
    codebook, blocks = CODEBOOKS["nf4"], 2**31 // 64 + 3
    small, _, _, pairs = write_cpu._tables(tuple(codebook.tolist()))
    x, packed, absmax = np.empty(blocks * 64, np.uint16), np.empty(blocks * 32, np.uint8), np.empty(blocks, np.float32)
    tail = torch.randn(128).to(torch.bfloat16)
    x[-128:] = tail.view(torch.uint16).numpy()
    write_cpu.pack_range(x, np.uint16(0x7FFF), write_cpu.widen, small, pairs, 64, blocks - 2, blocks, packed, absmax)
    want, scales = write_reference.quantize_blockwise(tail, codebook, 64)
    assert np.array_equal(packed[-64:], want.numpy()) and np.array_equal(absmax[-2:], scales.numpy())
    back = read_reference.dequantize_blockwise(want, scales, codebook, 64, 128, torch.float32)
    out = np.zeros(128, np.float32)
    read_cpu.unpack_range(packed, absmax, tuple(codebook.numpy()), read_cpu._as_it_is, 64, blocks - 2, blocks, blocks * 64, out)
    assert np.array_equal(out, back.numpy())
    if not avx512.missing():
        out[:] = 0
        read_cpu._unpack_range_avx512(packed, absmax, codebook.numpy(), 64, blocks - 2, blocks, out)
        assert np.array_equal(out, back.numpy())


def test_bfloat16_rounds_to_nearest_even() -> None:
    exact = torch.arange(0x3F80_0000, 0x3F80_0000 + 0x4_0000, 0x1000, dtype=torch.int32)
    values = torch.cat([exact.view(torch.float32), torch.tensor([0.0, -0.0, 1e-40, 3.3e38, float("inf")])])
    for value in values.tolist():
        got = torch.tensor(int(read_cpu.narrow(np.float32(value))), dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
        assert same_bits(got, torch.tensor(value).to(torch.bfloat16)), value


def test_halves_round_to_even_on_every_path() -> None:
    """# T57: products that lie exactly between two bfloat16 values, which random numbers hardly ever do."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(2)
    codebook = torch.linspace(-1, 1, 17)[1:].contiguous()  # multiples of 1/8
    absmax = torch.tensor([1 + (2 * odd + 1) / 256 for odd in range(16)])
    arguments = (packed, absmax, codebook, 64, 1024, torch.bfloat16)
    want = read_reference.dequantize_blockwise(*arguments)
    assert same_bits(read_cpu.dequantize_blockwise(*arguments), want)
    assert same_bits(read_cpu.dequantize_blockwise(*arguments, portable=True), want)


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
    ):
        with pytest.raises(ValueError):
            call()
