"""What differs from plain LoRA, as data: how alpha becomes a scaling, and what DoRA adds.

Shape letters: I in features, O out features, R rank, T tokens (any leading shape).

    plain   y_TO = base(x) + scaling * (B (A drop(x)) + lora_bias)
    dora    y_TO = base(x) + (g - 1) * (W drop(x)) + g * scaling * B (A drop(x)),   g_O = magnitude_O / ||W + scaling B A||_row

The norm of DoRA is a constant for the gradient (paper, section 4.3) and is found without building W + scaling B A:

    ||w_o + s b_o A||^2 = ||w_o||^2 + 2 s <w_o A^T, b_o> + s^2 b_o (A A^T) b_o^T

Does not create parameters (layer.py, embedding.py) and does not merge (merge.py).
Sources: LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, DoRA https://arxiv.org/abs/2402.09353
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


def scaling_of(alpha: float, rank: int, rslora: bool) -> float:
    """The factor before B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    >>> scaling_of(32, 16, False), scaling_of(32, 16, True)
    (2.0, 8.0)
    """
    return SCALINGS["rslora" if rslora else "lora"](alpha, rank)


@torch.no_grad()
def row_norms(weight_OI: Tensor, lora_a_RI: Tensor, lora_b_OR: Tensor, scaling: float) -> Tensor:
    """||W + scaling B A|| of every row, (O,) in float32 also under autocast; beside W in float32 it takes O(O * R) memory."""
    with torch.autocast(weight_OI.device.type, enabled=False):
        w, a, b = weight_OI.float(), lora_a_RI.float(), lora_b_OR.float()
        own = torch.linalg.vector_norm(w, dim=1).square()
        crossed = ((w @ a.T) * b).sum(1)
        update = ((b @ (a @ a.T)) * b).sum(1)
    # Rounding can push a row of almost zero length below zero.
    return (own + 2 * scaling * crossed + scaling**2 * update).clamp_min(0).sqrt()


def dora_gain(magnitude_O: Tensor, norm_O: Tensor) -> Tensor:
    """g = magnitude / norm, (O,), and 1 for a row of length 0, which has no direction; the norm is `row_norms`, without gradient."""
    there = norm_O > 0
    return torch.where(there, magnitude_O / torch.where(there, norm_O, 1), 1)


def merged_weight(weight_OI: Tensor, delta_OI: Tensor, magnitude_O: Tensor | None) -> Tensor:
    """The dense weight that acts as the base with its update, (O, I) in float32."""
    total = weight_OI.float() + delta_OI.float()
    if magnitude_O is None:
        return total
    return total * dora_gain(magnitude_O.float(), torch.linalg.vector_norm(total, dim=1))[:, None]
