"""search_scales in plain PyTorch, some thousand blocks at a time so that the temporaries stay in a core's cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels.quantize_blockwise.reference import thresholds_of

PIECE = 1 << 16  # elements worked on at a time


def search_scales(weight: Tensor, importance: Tensor, codebook: Tensor, multiples: Tensor, blocksize: int) -> Tensor:
    """weight (O, I), importance (I,), codebook (16,), multiples (M,) -> scales (N,) fp32."""
    levels = codebook.sort().values
    thresholds = thresholds_of(codebook)[0]
    flat, columns = weight.reshape(-1), weight.shape[1]
    found = []
    for start in range(0, flat.numel(), step := max(1, PIECE // blocksize) * blocksize):
        piece = flat[start : start + step].float()
        column = torch.arange(start, start + piece.numel(), device=piece.device) % columns
        fill = -piece.numel() % blocksize  # zeros, which every codebook holds: they add no error
        blocks = F.pad(piece, (0, fill)).view(-1, blocksize)
        found.append(_best(blocks, F.pad(importance[column], (0, fill)).view(-1, blocksize), levels, thresholds, multiples.tolist()))
    return torch.cat(found) if found else weight.new_empty(0, dtype=torch.float32)


def _best(weight_NK: Tensor, importance_NK: Tensor, levels: Tensor, thresholds: Tensor, multiples: list[float]) -> Tensor:
    """(N,) the scale with the least weighted error, block by block; the first of equals."""
    absmax = weight_NK.abs().amax(dim=1)
    best, least = absmax.clone(), torch.full_like(absmax, torch.inf)
    for multiple in multiples:
        scale = absmax * multiple
        inverse = torch.where(scale > 0, 1 / scale, 0)
        near = levels[torch.bucketize(weight_NK * inverse[:, None], thresholds)]
        error = torch.addcmul(weight_NK, near, scale[:, None], value=-1).square_().mul_(importance_NK).sum(dim=1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
