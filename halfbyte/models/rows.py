"""Where each sample of a batch begins and ends, handed to the decoder layers in the place of a dense mask.

A hook before the backbone (models/announce.py) looks at what the model was called with and says the same in a few numbers:

    positions       0 1 2 3 0 1 2 | 0 1 2 3 4 5 0          two rows; a sample begins where positions do not go up by one
    starts          0 4 7 13 14                            boundaries in the flat order of all tokens

transformers passes a mask of four dimensions through untouched, so an empty one carries the boundaries to every layer and no (T, T)
mask is made.  The hook acts only where all decoder layers can read it: without a cache, outside autocast, while gradients are recorded
and nobody asks for a cache (or the caller said use_cache=False).  A padding mask counts only if each row's real tokens stand together;
else the call goes its ordinary way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from halfbyte.kernels.cached_attention import cached_attention
from halfbyte.kernels.packed_attention import packed_attention

FEW = 4
"""Sequences that are decoded on own ops at once: as many as kernels/matmul_4bit multiplies without making a weight dense."""

@dataclass
class _Tokens:
    """A batch of `rows` times `width` tokens in flat order."""

    rows: int
    width: int
    _angles: dict[int, tuple[Any, Tensor, Tensor]] = field(default_factory=dict, kw_only=True)

    def angles(self, pair: Any) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (rows * width, R) in float32 (float64 stays), of what the rotary embedding gave as (1 or rows, width, R).

        Made once per pair: all layers of a call share it.
        """
        known = self._angles.get(id(pair))
        if known is None:
            flat = [part.expand(self.rows, -1, -1).reshape(self.rows * self.width, -1) for part in pair]
            cos, sin = (part.to(torch.promote_types(part.dtype, torch.float32)).contiguous() for part in flat)
            known = self._angles[id(pair)] = (pair, cos, sin)
        return known[1], known[2]


@dataclass
class Rows(_Tokens):
    """starts (S + 1,) int32 on the CPU: boundaries of samples in the flat order of tokens."""

    starts: Tensor

    def attend(self, attention: Any, plan: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(tokens, heads, D) of q (tokens, heads, D), k and v (tokens, groups, D): each sample sees itself."""
        return packed_attention(q, k, v, self.starts, plan.scaling, plan.window, plan.softcap)


@dataclass
class Step(_Tokens):
    """Decoding: one new token of each of `rows` sequences of one length, behind the keys and values in `cache`."""

    cache: DynamicCache

    def attend(self, attention: Any, plan: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(rows, heads, D) of q (rows, heads, D), k and v (rows, groups, D), which the cache takes."""
        keys, values = self.cache.update(k[:, :, None], v[:, :, None], attention.layer_idx)
        if 0 < plan.window < keys.shape[2]:
            keys, values = keys[:, :, -plan.window :], values[:, :, -plan.window :]
        return cached_attention(q, keys, values, plan.scaling, plan.softcap)


class RowMask(Tensor):
    """An empty tensor of four dimensions that knows its rows."""

    rows: Rows | Step


def mask_with(rows: Rows | Step) -> RowMask:
    """What the layers get as attention mask."""
    mask = torch.empty(0, 0, 0, 0).as_subclass(RowMask)
    mask.rows = rows
    return mask


def rows_of(mask: Any) -> Rows | Step | None:
    """The rows a mask carries; None for any other mask."""
    return mask.rows if isinstance(mask, RowMask) else None


def rows_from(shape: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None) -> Rows | None:
    """Rows of a batch of `shape` (rows, width); None where they cannot be said as boundaries.

    As transformers does: positions that restart mark packed samples only where no padding mask is given.
    """
    count, width = shape
    begins = torch.zeros(count, width, dtype=torch.bool)
    begins[:, 0] = True
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape != shape:
            return None
        real = attention_mask.cpu() != 0
        changes = real[:, 1:] != real[:, :-1]
        # real tokens in two pieces would have to see each other across the gap
        if bool(((changes & real[:, 1:]).sum(1) + real[:, 0] > 1).any()):
            return None
        begins[:, 1:] |= changes
    elif position_ids is not None:
        if position_ids.ndim != 2:
            return None
        begins[:, 1:] |= (position_ids[:, 1:] - position_ids[:, :-1] != 1).cpu()
    starts = torch.cat([begins.reshape(-1).nonzero().reshape(-1), torch.tensor([count * width])]).to(torch.int32)
    return Rows(count, width, starts)


def with_rows(backbone: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call of the backbone with its mask exchanged for one that carries rows; None where it has to stay as it is."""
    call = dict(named)
    names = ("input_ids", "attention_mask", "position_ids")
    if len(inputs) > len(names):
        return None
    call.update(zip(names, inputs))
    recording = torch.is_grad_enabled() and backbone.training and call.get("use_cache") is not True
    seen, cache = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds"), call.get("past_key_values")
    if (cache is not None and not _is_step(seen, cache)) or (cache is None and not (recording or call.get("use_cache") is False)):
        return None
    weights = call.get("output_attentions")
    if weights is None:
        weights = getattr(getattr(backbone, "config", None), "output_attentions", False)
    if seen is None or torch.is_autocast_enabled(seen.device.type) or weights:
        return None
    mask = call.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        return None
    if cache is not None:
        if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
            return None
        call["attention_mask"] = mask_with(Step(seen.shape[0], 1, cache))
        return (), call
    rows = rows_from((seen.shape[0], seen.shape[1]), mask, call.get("position_ids"))
    if rows is None:
        return None
    call["attention_mask"], call["use_cache"] = mask_with(rows), False
    return (), call


def _is_step(seen: Tensor | None, cache: Any) -> bool:
    """One token of each of a few sequences, with something in a plain cache, on the CPU, and no gradient."""
    few = seen is not None and seen.shape[1] == 1 and seen.shape[0] <= FEW and seen.device.type == "cpu"
    return few and not torch.is_grad_enabled() and type(cache) is DynamicCache and cache.get_seq_length() > 0


def watched(module: nn.Module) -> bool:
    """Somebody looks at its calls or has put another forward in its place; what transformers notes outputs with does not count."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    known = "output_capturing_hook"
    return any(getattr(hook, "__name__", "") != known for group in hooks for hook in group.values()) or "forward" in vars(module)


def epsilon(module: nn.Module) -> float:
    """The norm's epsilon under either of its names.  Raises TypeError where there is none."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    raise TypeError(f"{type(module).__name__} names no epsilon")
