"""packed_attention on a GPU: PyTorch's own attention with its own gradient, called so that no segment sees another.

float16 and bfloat16 go to `torch.nn.attention.varlen` in one call.  Other types, and a PyTorch whose varlen lacks grouped heads or a
window, take one call of scaled_dot_product_attention per segment.  Neither has a soft cap: that is left to the reference.

Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
"""

import importlib.util
import inspect
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

WIDEST_HEAD = 256  # of flash attention


def missing(q_THD: Tensor, softcap: float) -> str:
    """Why this cannot serve; empty when it can."""
    if softcap > 0:
        return "PyTorch's attention has no soft cap"
    return "float64 takes the reference" if q_THD.dtype == torch.float64 else ""


@cache
def _varlen() -> Any:
    """torch's varlen_attn where it has all that is needed, else None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if {"enable_gqa", "window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters) else None


@lru_cache(maxsize=8)
def _on(device: torch.device, edges: tuple[int, ...]) -> Tensor:
    """The boundaries on the device: copied once for a batch, not once for each of its layers."""
    return torch.tensor(edges, dtype=torch.int32, device=device)


def packed_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, starts: Tensor, scale: float, window: int) -> Tensor:
    """o (T, H, D) of q's dtype; differentiable through PyTorch."""
    edges = tuple(starts.tolist())
    varlen = _varlen()
    if varlen is not None and q_THD.dtype in (torch.float16, torch.bfloat16) and q_THD.shape[2] <= WIDEST_HEAD and len(q_THD):
        longest = max(end - begin for begin, end in pairwise(edges))
        on = _on(q_THD.device, edges)
        seen = (window - 1 if window > 0 else -1, 0)
        return varlen(q_THD, k_TGD, v_TGD, on, on, longest, longest, scale=scale, window_size=seen, enable_gqa=True)
    return by_segment(q_THD, k_TGD, v_TGD, edges, scale, window)


def by_segment(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, edges: tuple[int, ...], scale: float, window: int) -> Tensor:
    """One call of scaled_dot_product_attention per segment; runs on any device."""
    parts = []
    for begin, end in pairwise(edges):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        mask = None
        if 0 < window < end - begin:
            apart = torch.arange(end - begin, device=q.device)[:, None] - torch.arange(end - begin, device=q.device)
            mask = (apart >= 0) & (apart < window)
        made = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        parts.append(made[0].transpose(0, 1))
    return torch.cat(parts) if parts else torch.empty_like(q_THD)
