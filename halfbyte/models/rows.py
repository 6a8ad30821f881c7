"""Where each sample of a batch begins and ends, handed to the decoder layers in the place of a dense mask.

A hook before the backbone looks at what the model was called with and says the same in a few numbers:

    positions       0 1 2 3 0 1 2 | 0 1 2 3 4 5 0          two rows; a sample begins where positions do not go up by one
    starts          0 4 7 13 14                            boundaries in the flat order of all tokens

transformers passes a mask of four dimensions through untouched, so an empty one carries the boundaries to every layer and no (T, T)
mask is made.  The hook acts only where all decoder layers can read it: without a cache, outside autocast, while gradients are recorded
(or the caller said use_cache=False).  A padding mask counts only if each row's real tokens stand together; else the call goes its
ordinary way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Rows:
    """starts (S + 1,) int32 on the CPU: boundaries of samples in the flat order of tokens; rows and width of the batch."""

    starts: Tensor
    rows: int
    width: int
    _angles: dict[int, tuple[Any, Tensor, Tensor]] = field(default_factory=dict)

    def angles(self, pair: Any) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (rows * width, R), of what the model's rotary embedding gave as (1 or rows, width, R); made once per pair."""
        known = self._angles.get(id(pair))
        if known is None:
            cos, sin = (part.expand(self.rows, -1, -1).reshape(self.rows * self.width, -1) for part in pair)
            known = self._angles[id(pair)] = (pair, cos.contiguous(), sin.contiguous())
        return known[1], known[2]


class RowMask(Tensor):
    """An empty tensor of four dimensions that knows its rows."""

    rows: Rows


def mask_with(rows: Rows) -> RowMask:
    """What the layers get as attention mask."""
    mask = torch.empty(0, 0, 0, 0).as_subclass(RowMask)
    mask.rows = rows
    return mask


def rows_of(mask: Any) -> Rows | None:
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
    return Rows(starts, count, width)


def announce(backbone: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The hook: exchange the mask for one that carries rows; None leaves the call as it is."""
    call = dict(named)
    names = ("input_ids", "attention_mask", "position_ids")
    if len(inputs) > len(names):
        return None
    call.update(zip(names, inputs))
    recording = torch.is_grad_enabled() and backbone.training
    if call.get("past_key_values") is not None or not (recording or call.get("use_cache") is False):
        return None
    seen = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    weights = call.get("output_attentions")
    if weights is None:
        weights = getattr(getattr(backbone, "config", None), "output_attentions", False)
    if seen is None or torch.is_autocast_enabled(seen.device.type) or weights:
        return None
    mask = call.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        return None
    rows = rows_from((seen.shape[0], seen.shape[1]), mask, call.get("position_ids"))
    if rows is None:
        return None
    call["attention_mask"], call["use_cache"] = mask_with(rows), False
    return (), call


def reads_boundaries(model: Any) -> bool:
    """The model's layers take boundaries in the place of a mask."""
    return any(hook is announce for hook in getattr(model, "base_model", model)._forward_pre_hooks.values())
