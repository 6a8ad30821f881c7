"""packed_attention on a GPU: PyTorch's own attention with its own gradient, called so that no segment sees another.

`torch.nn.attention.varlen` takes a whole batch in one call where flash attention can run (`not_in_one_call` says why not); elsewhere
there is one call of scaled_dot_product_attention per segment.  Heads are padded here to a width that PyTorch's kernels take, for varlen
does not do it.  Neither has a soft cap: that is left to the reference.

Source: https://docs.pytorch.org/docs/2.12/nn.attention.varlen.html; what flash attention runs on: mha_varlen_fwd in
https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp and the conditions in
https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
"""

import importlib.util
import inspect
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from halfbyte.log import logger

WIDEST_HEAD = 256  # of flash attention
UNIT = 8  # of a head's width, in PyTorch's kernels
LEAST_CAPABILITY = (8, 0)
SMALL_SHARED_MEMORY = ((8, 6), (8, 9)), ((12, 0), (12, 1))  # first and last compute capability of cards made for one person's machine
NEEDED = ("scale", "window_size", "enable_gqa")


def missing(q_THD: Tensor, softcap: float) -> str:
    """Why this cannot serve; empty when it can."""
    if softcap > 0:
        return "PyTorch's attention has no soft cap"
    return "float64 takes the reference" if q_THD.dtype == torch.float64 else ""


def not_in_one_call(capability: tuple[int, int], width: int, dtype: torch.dtype, lacking: tuple[str, ...] = ()) -> str:
    """Why a batch goes through one call per segment; empty where flash attention takes it whole.

    `capability` is the card's compute capability, `width` that of a head, `lacking` what this PyTorch's varlen_attn has no argument for.
    """
    wide = -(-width // UNIT) * UNIT
    if lacking:
        return f"varlen_attn of this PyTorch has no {', '.join(lacking)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention has no {str(dtype).removeprefix('torch.')}"
    if capability < LEAST_CAPABILITY:
        return "flash attention needs compute capability 8.0, found {}.{}".format(*capability)
    if wide > WIDEST_HEAD:
        return f"flash attention takes heads up to {WIDEST_HEAD} wide, found {width}"
    if 192 < wide <= 224 and any(first <= capability <= last for first, last in SMALL_SHARED_MEMORY):
        return "flash attention has no gradient for heads {} wide on compute capability {}.{}".format(width, *capability)
    return ""


@cache
def _varlen() -> Any:
    """torch's varlen_attn; None where there is none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def lacking() -> tuple[str, ...]:
    """What `packed_attention` needs of varlen_attn and this PyTorch has not; 2.12 was the first with shared keys."""
    found = inspect.signature(_varlen()).parameters if _varlen() is not None else ()
    return tuple(name for name in NEEDED if name not in found)


@lru_cache(maxsize=64)
def _why(device: torch.device, width: int, dtype: torch.dtype) -> str:
    """`not_in_one_call` of a device, logged the first time."""
    reason = not_in_one_call(torch.cuda.get_device_capability(device), width, dtype, lacking())
    if reason:
        logger().info("packed_attention: one call per sample, not one per batch: %s", reason)
    return reason


@lru_cache(maxsize=8)
def _on(device: torch.device, edges: tuple[int, ...]) -> Tensor:
    """The boundaries on the device: copied once for a batch, not once for each of its layers."""
    return torch.tensor(edges, dtype=torch.int32, device=device)


def packed_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, starts: Tensor, scale: float, window: int) -> Tensor:
    """o (T, H, D) of q's dtype; differentiable through PyTorch."""
    edges, width = tuple(starts.tolist()), q_THD.shape[2]
    if not len(q_THD) or _why(q_THD.device, width, q_THD.dtype):
        flash = not not_in_one_call(torch.cuda.get_device_capability(q_THD.device), width, q_THD.dtype)
        return by_segment(q_THD, k_TGD, v_TGD, edges, scale, window, shared=flash)
    longest = max(end - begin for begin, end in pairwise(edges))
    on = _on(q_THD.device, edges)
    seen = (window - 1 if window > 0 else -1, 0)
    q, k, v = (_padded(x) for x in (q_THD, k_TGD, v_TGD))
    o: Tensor = _varlen()(q, k, v, on, on, longest, longest, scale=scale, window_size=seen, enable_gqa=True)
    return o[..., :width]


def _padded(x: Tensor) -> Tensor:
    """Zeros behind the last dimension up to a width that PyTorch's kernels take: they add nothing to a score and give columns of zeros."""
    return pad(x, (0, -x.shape[-1] % UNIT)) if x.shape[-1] % UNIT else x


def by_segment(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, edges: tuple[int, ...], scale: float, window: int, shared: bool = False
) -> Tensor:
    """One call of scaled_dot_product_attention per segment; runs on any device.

    `shared`: flash attention is there, which reads shared keys as they are.  It takes no mask; the kernel that does, like the one of older
    cards, wants as many key heads as query heads, and without them PyTorch would hold the scores of all tokens.
    """
    parts, group, width = [], q_THD.shape[1] // k_TGD.shape[1], q_THD.shape[2]
    for begin, end in pairwise(edges):
        q, k, v = (_padded(x[begin:end]).transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        mask = None
        if 0 < window < end - begin:
            apart = torch.arange(end - begin, device=q.device)[:, None] - torch.arange(end - begin, device=q.device)
            mask = (apart >= 0) & (apart < window)
        grouped = group > 1 and shared and mask is None
        if group > 1 and not grouped:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        made = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        parts.append(made[0].transpose(0, 1)[..., :width])
    return torch.cat(parts) if parts else torch.empty_like(q_THD)
