"""The specification of dequantize_blockwise in plain PyTorch; see the package for the formula."""

import torch
from torch import Tensor

Nested = tuple[Tensor, Tensor, Tensor]


def dequantize_blockwise(
    stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype, nested: Nested | None = None
) -> Tensor:
    """stored (ceil(n/2),) or (n,) uint8, absmax (N,) fp32, or uint8 with `nested` -> (n,) of `dtype`."""
    if nested is not None:
        absmax2, nested_codebook, offset = nested
        absmax = dequantize_blockwise(absmax, absmax2, nested_codebook, 256, absmax.numel(), torch.float32) + offset
    indices = stored.reshape(-1)
    if codebook.numel() == 16:
        indices = torch.stack([indices >> 4, indices & 15], dim=1).reshape(-1)[:numel]
    levels = codebook[indices.long()]
    return (levels * absmax.reshape(-1).repeat_interleave(blocksize)[:numel]).to(dtype)


def dequantize_into(
    out: Tensor, stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, nested: Nested | None = None
) -> None:
    """The same into `out`."""
    out.copy_(dequantize_blockwise(stored, absmax, codebook, blocksize, out.numel(), out.dtype, nested).view(out.shape))
