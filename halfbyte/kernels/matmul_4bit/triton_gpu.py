"""matmul_4bit in Triton: a fused matrix-vector product for decoding; for more rows, dequantize and let cuBLAS multiply.

With up to four rows of x the time is that of reading the weight once, at half a byte per element.  A program takes four outputs: it
walks along their packed rows, looks both levels of a byte up, multiplies them with the even and odd columns of x and adds up in fp32.
Nothing dense is made.  The weight enters as level * scale in fp32, without the rounding to `dtype` that a dense weight has: nearer to
the exact product than the reference, not its bits.
Above four rows a tensor-core product of the dense weight wins (measured so by others from some hundred rows on, and the rows of a
training step are thousands), so that there is no fused matrix product here.

Proven in Triton's interpreter against the reference; compiled for sm_90 and sm_80, not yet timed on a GPU.
Source: https://arxiv.org/abs/2305.14314 (QLoRA, equation 5)
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize_blockwise import Nested
from halfbyte.kernels.dequantize_blockwise.triton_gpu import scale_of
from halfbyte.kernels.matmul_4bit import reference
from halfbyte.kernels.matmul_4bit.reference import input_gradient
from halfbyte.kernels.triton_launch import launch, power_of_2

__all__ = ["input_gradient", "matmul_4bit"]  # the gradient is a dense product for any number of rows

ROWS = 4  # rows of x up to which the fused kernel serves
OUTPUTS = 4  # outputs of one program
CHUNK = 1024  # columns of one step


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, packed, absmax, codebook, absmax2, nested_codebook, offset, y, rows, outputs, columns,
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """y (rows, outputs) = x (rows, columns) @ W.T for OUTPUTS rows of W; tiles are (ROWS, OUTPUTS, bytes of BLOCKS blocks)."""
    HALF: tl.constexpr = BLOCKSIZE // 2
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS).to(tl.int64)
    place = tl.arange(0, BLOCKS * HALF)
    blocks = columns // BLOCKSIZE
    total = tl.zeros((ROWS, OUTPUTS, BLOCKS * HALF), tl.float32)
    for start in range(0, blocks, BLOCKS):
        number = start + tl.arange(0, BLOCKS)
        block = output[:, None] * blocks + number[None, :]
        scale = scale_of(block, (output < outputs)[:, None] & (number < blocks)[None, :], absmax, absmax2, nested_codebook, offset)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (OUTPUTS, BLOCKS, HALF)), (OUTPUTS, BLOCKS * HALF))
        at = start * HALF + place
        inside = (output < outputs)[:, None] & (at < blocks * HALF)[None, :]
        byte = tl.load(packed + output[:, None] * (blocks * HALF) + at[None, :], mask=inside, other=0).to(tl.int32)
        there = (row < rows)[:, None] & (at < blocks * HALF)[None, :]
        even = tl.load(x + row[:, None] * columns + 2 * at[None, :], mask=there, other=0.0).to(tl.float32)
        odd = tl.load(x + row[:, None] * columns + 2 * at[None, :] + 1, mask=there, other=0.0).to(tl.float32)
        first, second = tl.load(codebook + (byte >> 4)) * scale, tl.load(codebook + (byte & 15)) * scale
        # past the end the scale of a nested block is the offset, but x is zero there and the output is not stored
        total += even[:, None, :] * first[None, :, :] + odd[:, None, :] * second[None, :, :]
    kept = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(y + row[:, None] * outputs + output[None, :], tl.sum(total, axis=2).to(y.dtype.element_ty), mask=kept)


def matmul_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """x (..., I), packed weight of `shape` (O, I) -> (..., O) in x's dtype."""
    outputs, columns = shape
    rows = x.numel() // max(columns, 1)
    if rows > ROWS or columns % blocksize or blocksize != power_of_2(blocksize) or blocksize > CHUNK:
        return reference.matmul_4bit(x, packed, absmax, codebook, blocksize, shape, dtype, nested)
    y = x.new_empty((*x.shape[:-1], outputs))
    parts = (packed.contiguous(), absmax.contiguous(), codebook, *(part.contiguous() for part in nested or ()))
    launch(
        _multiply, -(-outputs // OUTPUTS) if rows else 0, x.contiguous(), *parts, *(() if nested else (None, None, None)),
        y, rows, outputs, columns, BLOCKSIZE=blocksize, BLOCKS=CHUNK // blocksize, ROWS=power_of_2(rows), OUTPUTS=OUTPUTS,
    )  # fmt: skip
    return y
