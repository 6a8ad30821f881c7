"""The CPU kernels of packed weights against their references; as a program it checks those made for NUMBA_CPU_NAME."""

import torch

from halfbyte.kernels import instructions
from halfbyte.kernels.dequantize_blockwise import cpu as read_cpu
from halfbyte.kernels.dequantize_blockwise import reference as read_reference
from halfbyte.kernels.matmul_4bit import cpu as product_cpu
from halfbyte.kernels.matmul_4bit import reference as product_reference
from halfbyte.kernels.quantize_blockwise import cpu as write_cpu
from halfbyte.kernels.quantize_blockwise import reference as write_reference
from halfbyte.quant.codebooks import CODEBOOKS
from tests.quant.quant_oracle import same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 31, 32, 33, 63, 64, 65, 127, 191, 300, 4096, 5001)
Nested = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def nested_scales(count: int) -> tuple[torch.Tensor, Nested]:
    """(indices (count,), what they mean) of random scales stored in 8 bits."""
    absmax2 = torch.rand(-(-count // 256)) + 0.1
    return torch.randint(0, 256, (count,), dtype=torch.uint8), (absmax2, CODEBOOKS["dynamic-signed"], torch.tensor(1.7))


def writes(dtype: torch.dtype, name: str, blocksize: int, size: int) -> None:
    x = (torch.randn(size) * 10.0 ** torch.randint(-6, 6, ())).clamp(-6e4, 6e4).to(dtype)
    got, want = (run.quantize_blockwise(x, CODEBOOKS[name], blocksize) for run in (write_cpu, write_reference))
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1]), (dtype, name, blocksize, size)


def reads_back(dtype: torch.dtype, name: str, blocksize: int, size: int, nested: bool) -> None:
    codebook = CODEBOOKS[name]
    stored = torch.randint(0, 256, ((size + 1) // 2 if codebook.numel() == 16 else size,), dtype=torch.uint8)
    absmax, parts = torch.rand(-(-size // blocksize)) * 10.0 ** torch.randint(-6, 4, ()), None
    if nested:
        absmax, parts = nested_scales(len(absmax))
    arguments = (stored, absmax, codebook, blocksize, size, dtype, parts)
    got, want = (run.dequantize_blockwise(*arguments) for run in (read_cpu, read_reference))
    assert same_bits(got, want), (dtype, name, blocksize, size, nested)


def multiplies(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, rows: int, shape: tuple[int, int], blocksize: int, nested: bool, name: str = "nf4"
) -> None:
    """A few rows of x: the products of the reference's very weight, summed in float32 in another order."""
    count = shape[0] * shape[1]
    packed, absmax = write_reference.quantize_blockwise(torch.randn(count), CODEBOOKS[name], blocksize)
    parts = None
    if nested:
        absmax, parts = nested_scales(len(absmax))
    weight = (packed, absmax, CODEBOOKS[name], blocksize, shape, weight_dtype, parts)
    x = torch.randn(rows, shape[1]).to(x_dtype)
    got = product_cpu.matmul_4bit(x, *weight)
    dense = product_reference._dense(*weight).to(x_dtype).double()
    want, scale = x.double() @ dense.T, x.double().abs() @ dense.T.abs()
    assert got.dtype == x_dtype and got.shape == want.shape
    error = (got.double() - want).abs()
    # bfloat16: the result's rounding, and that of levels instead of weights where products of bfloat16 are used
    slack = want.abs() * 2.0**-8 + scale * 2.0**-8 if x_dtype == torch.bfloat16 else 0
    assert (error <= slack + 2e-6 * scale).all(), (x_dtype, weight_dtype, rows, shape, blocksize, nested, name)


def main() -> None:
    torch.set_num_threads(1)
    for dtype in FLOATS[:2]:
        for name in ("nf4", "fp4", "dynamic-signed"):
            for blocksize in (32, 64, 70):
                for size in SIZES:
                    writes(dtype, name, blocksize, size)
                    reads_back(dtype, name, blocksize, size, size % 2 == 0)
        for rows in (1, 3):
            for shape, blocksize in (((5, 96), 64), ((3, 128), 32), ((4, 70), 64)):
                multiplies(dtype, torch.bfloat16, rows, shape, blocksize, rows == 1)
    print(instructions.level())


if __name__ == "__main__":
    main()
