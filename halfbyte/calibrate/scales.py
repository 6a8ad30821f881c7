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
from torch import Tensor

from halfbyte.kernels.search_scales import search_scales
from halfbyte.quant import blockwise
from halfbyte.quant.codebooks import CODEBOOKS
from halfbyte.quant.quant_state import QuantState

GRID = tuple(round(0.70 + 0.02 * step, 2) for step in range(18))
"""Multiples of the largest magnitude that are tried: 0.70, 0.72, ... 1.04; 1.00, the plain scale, is among them."""
FLOOR = 0.01


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
    multiples = torch.tensor(GRID, dtype=torch.float32, device=weight_OI.device)
    absmax = search_scales(weight_OI, importance_I, CODEBOOKS[format].to(weight_OI.device), multiples, blocksize)
    return blockwise.pack_with_scales(weight_OI, absmax, format, blocksize, double_quant)
