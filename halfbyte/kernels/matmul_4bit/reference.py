"""The specification of matmul_4bit: dequantize, then a dense matmul."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise

Nested = tuple[Tensor, Tensor, Tensor]


def matmul_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """x (..., I), packed weight of `shape` (O, I) -> (..., O) in x's dtype."""
    return torch.nn.functional.linear(x, _dense(packed, absmax, codebook, blocksize, shape, dtype, nested).to(x.dtype))


def input_gradient(
    dy: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype,
    nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """dy (..., O) -> dx (..., I) in dy's dtype."""
    return dy @ _dense(packed, absmax, codebook, blocksize, shape, dtype, nested).to(dy.dtype)


def _dense(
    packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype, nested: Nested | None
) -> Tensor:
    rows, columns = shape
    return dequantize_blockwise(packed, absmax, codebook, blocksize, rows * columns, dtype, nested).view(rows, columns)
