"""The hook before the backbone of a model on own layers: may they run now, and where does each sample begin.

Own ops use the numbers of norms, attention and MLP and do not call them, so what somebody has put there since (hooks, another module, a
cast to another type) would be passed over.  All layers are looked at before each call, for a batch without dense masks needs all of them;
where one stands against it the whole call runs as transformers' own, which is said once, and own layers are back when it is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.log import logger
from halfbyte.models.decoder_layer import FusedLayer, decoder_layers
from halfbyte.models.rows import watched, with_rows


@dataclass(frozen=True)
class Announce:
    """The hook; `lists` names the lists of decoder layers in the backbone, so that a call does not walk through all modules."""

    lists: tuple[str, ...]

    def __call__(
        self, backbone: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Rows in the place of the mask, where all layers can run on own ops; None leaves the call as it is."""
        changed, given = with_rows(backbone, inputs, named), named.get("inputs_embeds")
        reason = "" if changed is None else self.obstacle(backbone, None if given is None else given.dtype)
        if reason:
            _say(reason)
        return None if reason else changed

    def obstacle(self, backbone: Any, dtype: torch.dtype | None = None) -> str:
        """What keeps a layer from own ops, with its name; `dtype` of the hidden states, None where they come from the embedding."""
        if dtype is None:
            embedding = backbone.get_input_embeddings()
            weight = getattr(getattr(embedding, "base", embedding), "weight", None)
            dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None
        named = ((f"{name}.{number}", layer) for name in self.lists for number, layer in backbone.get_submodule(name).named_children())
        reasons = ((name, obstacle(layer, dtype)) for name, layer in named if isinstance(layer, FusedLayer))
        return next((f"{name}: {reason}" for name, reason in reasons if reason), "")


def announce(backbone: nn.Module) -> None:
    """Set the hook before a backbone whose decoder layers were taken over."""
    lists = dict.fromkeys(name.rpartition(".")[0] for name in decoder_layers(backbone))
    backbone.register_forward_pre_hook(Announce(tuple(lists)), with_kwargs=True)


def reads_boundaries(model: Any) -> bool:
    """The model's layers take boundaries in the place of a mask."""
    backbone = getattr(model, "base_model", model)
    hooks = [hook for hook in backbone._forward_pre_hooks.values() if isinstance(hook, Announce)]
    return bool(hooks) and not hooks[0].obstacle(backbone)


@cache
def _say(reason: str) -> None:
    logger().warning("the decoder layers run as transformers' own: %s", reason)


def obstacle(layer: Any, dtype: torch.dtype | None) -> str:
    """Why the layer has to run as the original does; empty where nothing stands in the way.

    Hooks on a part that own ops do not call would never run, another part in its place would be passed over.  `dtype` is that of the
    hidden states, None where it is not known: a norm in another type changes the type of what leaves it.
    """
    for name, kind in layer.kinds.items():
        part = layer.get_submodule(name)
        if type(part) is not kind:
            return f"{name} is a {type(part).__name__}, not the {kind.__name__} that was examined"
        if watched(part):
            return f"{name} has hooks or a forward of its own"
        if dtype is not None and name.rpartition(".")[2] in layer.plan.forms and part.weight.dtype != dtype:
            return f"{name} is {part.weight.dtype}, what goes through it {dtype}"
    if layer.plan.gated and any(watched(part) for name, part in layer.mlp.named_children() if not name.endswith("_proj")):
        return "a part of mlp has hooks or a forward of its own"
    return ""
