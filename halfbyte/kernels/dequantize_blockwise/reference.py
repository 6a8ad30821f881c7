"""The specification of dequantize_blockwise in plain PyTorch; see the package for the formula."""

import torch
from torch import Tensor


def dequantize_blockwise(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    """stored (ceil(n/2),) or (n,) uint8, absmax (N,) fp32 -> (n,) of `dtype`."""
    indices = stored.reshape(-1)
    if codebook.numel() == 16:
        indices = torch.stack([indices >> 4, indices & 15], dim=1).reshape(-1)[:numel]
    levels = codebook[indices.long()]
    return (levels * absmax.reshape(-1).repeat_interleave(blocksize)[:numel]).to(dtype)
