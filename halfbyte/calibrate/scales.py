"""A 4-bit weight whose block scales are chosen for what the layer does, in the bytes of the plain format.

    plain       s_b = absmax_b = max |w| over block b
    here        s_b = m absmax_b,  m in GRID, the one with the least  sum_j h_j (w_j - s_b level_j)^2  over the block
                h_j = mean of x_j^2 over the calibration tokens, at least FLOOR of its own mean over j

A scale below the largest weight cuts that weight short and gives all others of its block finer steps.  Whether that pays depends on
which inputs carry the activations: the same search with h = 1 shrinks the error of the weight and does not help the model.  Afterwards
the scales are quantized to 8 bits as ever (double quantization), and the indices are picked once more for the scales as they read back.
What is written is an ordinary nf4 (or fp4) tensor: bitsandbytes, transformers and vLLM read it.

Shapes: weight (O, I) row-major in N blocks of K elements, which may begin in the middle of a row; importance h (I,)
Source: https://arxiv.org/abs/2306.00978 (AWQ, activation-weighted error), https://arxiv.org/abs/2305.14314 (NF4, double quantization)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels.quantize_blockwise.reference import thresholds_of
from halfbyte.quant import blockwise
from halfbyte.quant.codebooks import CODEBOOKS
from halfbyte.quant.quant_state import QuantState

GRID = tuple(round(0.70 + 0.02 * step, 2) for step in range(18))
"""Multiples of the largest magnitude that are tried: 0.70, 0.72, ... 1.04; 1.00, the plain scale, is among them."""
FLOOR = 0.01
PIECE = 1 << 16  # elements worked on at a time: the temporaries stay in a core's cache


def importance_of(diagonal_I: Tensor) -> Tensor:
    """(I,) how much an error in each column of a weight matters: the second moment of its input, mean 1, at least FLOOR."""
    mean = diagonal_I.mean()
    if not bool(mean > 0):
        return torch.ones_like(diagonal_I)
    return (diagonal_I / mean).clamp_min(FLOOR)


@torch.no_grad()
def quantize_weighted(
    weight_OI: Tensor, importance_I: Tensor, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, name: str = ""
) -> tuple[Tensor, QuantState]:
    """(packed, state) as `quant.blockwise.quantize` gives them, with searched scales.  Raises WeightError where it is not finite."""
    blockwise.refuse_non_finite(weight_OI, name)
    absmax = _searched(weight_OI, importance_I, format, blocksize)
    return blockwise.pack_with_scales(weight_OI, absmax, format, blocksize, double_quant)


def _searched(weight_OI: Tensor, importance_I: Tensor, format: str, blocksize: int) -> Tensor:
    """(N,) the best scale of each block before double quantization."""
    levels = CODEBOOKS[format].sort().values
    thresholds = thresholds_of(levels)[0].tolist()
    rows, columns = weight_OI.shape
    step = max(1, PIECE // blocksize) * blocksize
    flat = weight_OI.reshape(-1)
    found = []
    for start in range(0, rows * columns, step):
        piece = flat[start : start + step].float()
        column = torch.arange(start, start + piece.numel(), device=piece.device) % columns
        fill = -piece.numel() % blocksize
        blocks = F.pad(piece, (0, fill)).view(-1, blocksize)
        found.append(_best_scales(blocks, F.pad(importance_I[column], (0, fill)).view(-1, blocksize), levels.tolist(), thresholds))
    return torch.cat(found)


def _nearest(scaled_NK: Tensor, levels: list[float], thresholds: list[float]) -> Tensor:
    """The level nearest to each number: the lowest, and a step up for each threshold below it.

    15 comparisons over the whole piece are five times as fast here as a binary search for each number.
    """
    near, above = torch.full_like(scaled_NK, levels[0]), torch.empty_like(scaled_NK)
    for threshold, lower, higher in zip(thresholds, levels, levels[1:], strict=False):
        near.add_(torch.gt(scaled_NK, threshold, out=above), alpha=higher - lower)
    return near


def _best_scales(weight_NK: Tensor, importance_NK: Tensor, levels: list[float], thresholds: list[float]) -> Tensor:
    """(N,) the scale of the grid with the least weighted error, block by block; the first of equals."""
    absmax = weight_NK.abs().amax(dim=1)
    best, least = absmax.clone(), torch.full_like(absmax, torch.inf)
    for multiple in GRID:
        scale = absmax * multiple
        inverse = torch.where(scale > 0, 1 / scale, 0)
        near = _nearest(weight_NK * inverse[:, None], levels, thresholds)
        error = torch.addcmul(weight_NK, near, scale[:, None], value=-1).square_().mul_(importance_NK).sum(dim=1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
