"""The specification of quantize_blockwise in plain PyTorch; see the package for the formula."""

import torch
from torch import Tensor

SMALLEST = 1e-38  # keeps the reciprocal of an all-zero block finite, so that 0 stays 0


def thresholds_of(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(midpoints of the sorted codebook (L-1,), order (L,)): `order[rank]` is the index of the level of that rank."""
    levels, order = torch.sort(codebook, stable=True)
    return (levels[:-1] + levels[1:]) / 2, order


def quantize_blockwise(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x any shape -> (packed or indices uint8, absmax fp32)."""
    flat = x.reshape(-1).float()
    count = flat.numel()
    whole = count - count % blocksize
    blocks_NK = flat[:whole].view(-1, blocksize)
    absmax_N = blocks_NK.abs().amax(dim=1) if whole else flat.new_empty(0)
    scaled = (blocks_NK * (1.0 / absmax_N.clamp(min=SMALLEST))[:, None]).reshape(-1)
    if whole < count:
        last = flat[whole:].abs().max()
        divisor = last.clamp(min=SMALLEST)
        absmax_N = torch.cat([absmax_N, (divisor if codebook.numel() == 16 else last)[None]])
        scaled = torch.cat([scaled, flat[whole:] / divisor])
    thresholds, order = thresholds_of(codebook)
    if codebook.numel() == 16 and count % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    indices = order[torch.bucketize(scaled, thresholds)].to(torch.uint8)
    if codebook.numel() == 256:
        return indices, absmax_N
    return (indices[::2] << 4) | indices[1::2], absmax_N
