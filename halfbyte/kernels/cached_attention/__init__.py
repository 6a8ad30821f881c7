"""cached_attention: one new token of each sequence against all keys and values kept so far.

    s_j = cap(scale q . k_j)      p = softmax(s)      o = sum_j p_j v_j          cap(s) = c tanh(s / c) where a softcap c is given

Decoding only: every key is seen, nothing is masked, there is no gradient.  The caller cuts keys to a sliding window.

Source: https://arxiv.org/abs/1706.03762
Shapes: q (B, H, D), k and v (B, G, T, D) with H a multiple of G -> o (B, H, D) of q's dtype; sums in float32
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "cached_attention"
LIBRARY.define("cached_attention(Tensor q, Tensor k, Tensor v, float scale, float softcap=0.0) -> Tensor")


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[2]):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or k.shape[2] == 0:
        raise ValueError(f"{q.shape[1]} heads on {k.shape[1]} key heads of {k.shape[2]} tokens")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must be of one floating-point type, found {q.dtype}, {k.dtype}, {v.dtype}")


def _serve(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    check(q, k, v)
    return listing.implementation(OP, q).cached_attention(q, k, v, scale, softcap)


LIBRARY.impl("cached_attention", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::cached_attention", lambda q, k, v, scale, softcap=0.0: torch.empty_like(q), lib=LIBRARY)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """(B, H, D); not differentiable.  Raises ValueError on arguments that do not fit."""
    return torch.ops.halfbyte.cached_attention(q, k, v, scale, softcap)
