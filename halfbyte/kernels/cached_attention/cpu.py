"""cached_attention on the CPU: a head is an item; its scores and its sum of values lie in a row of float32 scratch.

float16 takes the reference: there are no instructions for it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.cached_attention import reference
from halfbyte.kernels.native import inline_fused, load, native, store
from halfbyte.kernels.scalars import exp, exp_below

_ONE = np.float32(1)


@inline_fused
def _capped(s, cap):  # type: ignore[no-untyped-def]
    fall = exp(np.float32(-2) * abs(s / cap))
    size = cap * (_ONE - fall) / (_ONE + fall)
    return -size if s < np.float32(0) else size


@native(
    "q: T*, k: T*, v: T*, o: T*, scratch: f32*, repeats: i64, tokens: i64, width: i64, scale: f32, cap: f32",
    T=("bf16", "f32"), fast=True, apart=True,
)  # fmt: skip
def attend_heads(
    q: Any, k: Any, v: Any, o: Any, scratch: Any, repeats: int, tokens: int, width: int, scale: float, cap: float, first: int, last: int
) -> None:  # fmt: skip
    """Heads first..last of all sequences; head h reads keys of group h // repeats."""
    for head in range(first, last):
        at, keys, row = head * width, (head // repeats) * tokens * width, head * (tokens + width)
        top = np.float32(-3.4e38)
        for j in range(tokens):
            total = np.float32(0)
            for d in range(width):
                total += load(q, at + d) * load(k, keys + j * width + d)
            score = total * scale
            score = _capped(score, cap) if cap > 0 else score
            scratch[row + j] = score
            top = max(top, score)  # a NaN comes back with its own exponential
        whole = np.float32(0)
        for j in range(tokens):
            share = exp_below(scratch[row + j] - top)
            scratch[row + j] = share
            whole += share
        total_at = row + tokens
        for d in range(width):
            scratch[total_at + d] = np.float32(0)
        for j in range(tokens):
            share = scratch[row + j]
            for d in range(width):
                scratch[total_at + d] += share * load(v, keys + j * width + d)
        for d in range(width):
            store(o, at + d, scratch[total_at + d] / whole)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
    """q (B, H, D), k and v (B, G, T, D) -> (B, H, D)."""
    if q.dtype == torch.float16:
        return reference.cached_attention(q, k, v, scale, softcap)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    heads, tokens, width = q.shape[0] * q.shape[1], k.shape[2], q.shape[2]
    o = torch.empty_like(q)
    scratch = torch.empty(heads * (tokens + width), dtype=torch.float32)
    attend_heads(heads, q, k, v, o, scratch, q.shape[1] // k.shape[1], tokens, width, scale, softcap, work=2 * heads * tokens * width)
    return o
