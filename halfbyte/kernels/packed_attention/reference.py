"""packed_attention in plain PyTorch: the specification.  One segment after the other, all its scores at once; float32, or float64."""

from itertools import pairwise

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _seen(tokens: int, window: int, device: torch.device) -> Tensor:
    """(tokens, tokens) true where query i sees key j."""
    apart = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (apart >= 0) & (apart < window) if window > 0 else apart >= 0


def _scores(q_THD: Tensor, k_TGD: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """(H, T, T) scores of one segment, -inf where not seen."""
    k_THD = k_TGD.repeat_interleave(q_THD.shape[1] // k_TGD.shape[1], dim=1)
    s_HTT = torch.einsum("thd,shd->hts", q_THD * scale, k_THD)
    if softcap > 0:
        s_HTT = softcap * torch.tanh(s_HTT / softcap)
    return s_HTT.masked_fill(~_seen(len(q_THD), window, q_THD.device), float("-inf"))


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, starts: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(o (T, H, D) of q's dtype, lse (H, T))."""
    q, k, v = _wide(q_THD), _wide(k_TGD), _wide(v_TGD)
    o, lse_HT = torch.empty_like(q_THD, memory_format=torch.contiguous_format), q.new_empty(q.shape[1], len(q))
    edges = starts.tolist()
    for begin, end in pairwise(edges):
        here = slice(begin, end)
        s_HTT = _scores(q[here], k[here], scale, window, softcap)
        lse_HT[:, here] = s_HTT.logsumexp(-1)
        p_HTT = torch.exp(s_HTT - lse_HT[:, here, None])
        o[here] = torch.einsum("hts,shd->thd", p_HTT, v[here].repeat_interleave(q.shape[1] // v.shape[1], dim=1))
    return o, lse_HT


def packed_attention_backward(
    do: Tensor, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, o: Tensor, lse_HT: Tensor, starts: Tensor, scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), shapes and dtypes of q, k, v."""
    q, k, v, upstream = (_wide(x) for x in (q_THD, k_TGD, v_TGD, do))
    delta_HT = (upstream * _wide(o)).sum(-1).T
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_TGD, v_TGD))
    group, edges = q.shape[1] // k.shape[1], starts.tolist()
    for begin, end in pairwise(edges):
        here, size = slice(begin, end), end - begin
        s_HTT = _scores(q[here], k[here], scale, window, softcap)
        p_HTT = torch.exp(s_HTT - lse_HT[:, here, None])
        dp_HTT = torch.einsum("thd,shd->hts", upstream[here], v[here].repeat_interleave(group, dim=1))
        ds_HTT = p_HTT * (dp_HTT - delta_HT[:, here, None])
        if softcap > 0:
            ds_HTT = ds_HTT * (1 - (s_HTT.masked_fill(p_HTT == 0, 0.0) / softcap) ** 2)
        dq[here] = torch.einsum("hts,shd->thd", ds_HTT, k[here].repeat_interleave(group, dim=1)) * scale
        by_head = (torch.einsum("hts,thd->shd", ds_HTT, q[here]) * scale, torch.einsum("hts,thd->shd", p_HTT, upstream[here]))
        for target, source in zip((dk, dv), by_head, strict=True):
            target[here] = source.view(size, k.shape[1], group, k.shape[2]).sum(2)
    return dq, dk, dv
