"""The specification of matmul_4bit: dequantize, then a dense matmul."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise


def matmul_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """x (..., I), packed weight of `shape` (O, I) -> (..., O) in x's dtype."""
    rows, columns = shape
    weight_OI = dequantize_blockwise(packed, absmax, codebook, blocksize, rows * columns, dtype).view(rows, columns)
    return torch.nn.functional.linear(x, weight_OI.to(x.dtype))
