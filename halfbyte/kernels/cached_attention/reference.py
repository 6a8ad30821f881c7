"""cached_attention in plain PyTorch: float32 inside, float64 stays."""

import torch
from torch import Tensor


def cached_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
    """q (B, H, D), k and v (B, G, T, D) -> (B, H, D)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    sequences, heads, width = q.shape
    q_BGRD = q.to(exact).view(sequences, k.shape[1], heads // k.shape[1], width)
    scores = torch.einsum("bgrd,bgtd->bgrt", q_BGRD, k.to(exact)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("bgrt,bgtd->bgrd", scores.softmax(-1), v.to(exact)).reshape(q.shape).to(q.dtype)
