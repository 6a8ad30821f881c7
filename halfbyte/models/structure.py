"""What a decoder layer is made of, found by the names and kinds of its parts and proved by running it beside the original.

    fuse(model)     every decoder layer is taken over by `decoder_layer.FusedLayer`, or none, with the reason

Names alone do not say what a layer computes (where a norm stands, in which order it casts, whether positions rotate), so the possible
readings are tried on what the model itself hands to the layer: twelve tokens of two packed samples go through the original once, each
layer's input is noted, and the reading nearest to what the layer makes of it is taken.  Both run in float32, on a copy of the layer
where it is narrower: in bfloat16 one rounding of the residual stream hides which way positions rotate.  Layers that agree in classes
and in all plain settings share a reading.  A layer that no reading fits keeps the model on its original layers, for a batch without
dense masks needs all layers to read boundaries.  Windows longer than the probe are taken from the settings; tests with short ones
prove the rule.

Does not: LayerNorm, interleaved rotation, attention sinks, ALiBi.  `doctor MODEL` prints what was found.
"""

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from halfbyte import surgery
from halfbyte.kernels.gated_mlp import gated_act
from halfbyte.kernels.rms_norm import rms_norm
from halfbyte.log import logger
from halfbyte.models import folder_checks
from halfbyte.models.announce import announce
from halfbyte.models.decoder_layer import POLICIES, FusedLayer, Plan, decoder_layers, epsilon, run, take_over
from halfbyte.models.modes import evaluating
from halfbyte.models.rows import rows_from, watched
from halfbyte.models.transformers_calls import quiet
from halfbyte.quant.dense import is_linear_like

TOKENS = (7, 5)
ROUNDINGS = 16
LAYER_ROUNDINGS = 128  # of float32, over a layer's sums of thousands of products; another structure is off by thousands more
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
NORM_PLACES = (
    ("input_layernorm", "", "post_attention_layernorm", ""),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    ("attention_layernorm", "", "feedforward_layernorm", ""),
)
CAPS = re.compile("softcap|logit_cap")
ACTS = ("silu", "gelu_tanh", "gelu")


@dataclass(frozen=True)
class Fused:
    """What `fuse` did: how many layers run on own ops, how many of their MLPs do, and why not (empty: all do)."""

    layers: int
    gated: int
    reason: str = ""

    def __str__(self) -> str:
        if not self.layers:
            return f"transformers' own: {self.reason}"
        parts = "norms, rotary, attention"
        return f"{parts}, MLP and head on own ops" if self.layers == self.gated else f"{parts} and head on own ops; {self.reason}"


class Unfit(Exception):
    """A part that no reading knows; the text is the reason."""


@dataclass
class _Seen:
    hidden: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]


def fuse(model: Any) -> Fused:
    """Take over the model's decoder layers where all of them fit; a second call finds it done."""
    layers = decoder_layers(model)
    backbone = getattr(model, "base_model", model)
    if layers and all(isinstance(layer, FusedLayer) for layer in layers.values()):
        return _counted(layers)
    try:
        plans = _plans(model, backbone, layers)
    except Unfit as unfit:
        logger().debug("own decoder layers are not used: %s", unfit)
        return Fused(0, 0, str(unfit))
    for name, layer in layers.items():
        surgery.replace(model, name, take_over(layer, plans[name]))
    announce(backbone)
    return _counted(decoder_layers(model))


def examine(folder: Path) -> Fused:
    """What `fuse` would do with the model in a folder, tried on a few of its layers with random weights and a small vocabulary.

    Raises ModelError where config.json is not one of a known language model.
    """
    config = folder_checks.make_config(folder_checks.read_config(folder), folder)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    text.num_hidden_layers = min(text.num_hidden_layers, 1 + max([1, *(kinds.index(kind) for kind in set(kinds))]))
    text.vocab_size, text.pad_token_id = min(text.vocab_size, 128), None
    if kinds:
        text.layer_types = kinds[: text.num_hidden_layers]
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = kind._from_config(config, dtype=torch.bfloat16)
    return fuse(model)


def is_fused(model: nn.Module) -> bool:
    """The model's decoder layers run on own ops."""
    return any(isinstance(layer, FusedLayer) for layer in decoder_layers(model).values())


def set_policy(model: nn.Module, policy: str) -> None:
    """What fused layers keep for the backward pass; models/recompute.py has the table."""
    for layer in decoder_layers(model).values():
        layer.__dict__["policy"] = policy


def _counted(layers: dict[str, nn.Module]) -> Fused:
    gated = sum(bool(layer.plan.gated) for layer in layers.values() if isinstance(layer, FusedLayer))
    rest = len(layers) - gated
    return Fused(len(layers), gated, f"the MLP of {rest} layers is not a gated one of known parts" if rest else "")


def _plans(model: Any, backbone: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Plan]:
    if not layers:
        raise Unfit("no decoder layers with a self_attn were found")
    parents = {name.rpartition(".")[0] for name in layers}
    others = {f"{parent}.{number}" for parent in parents for number, _ in model.get_submodule(parent).named_children()}
    if others - set(layers):
        raise Unfit(f"{len(others - set(layers))} of {len(others)} layers hold no self_attn")
    if any("forward" in vars(module) for layer in layers.values() for module in layer.modules()):
        raise Unfit("a module has a forward of its own, not that of its class")
    strange = [name for layer in layers.values() for name, part in layer.named_modules() if name and _hooked(part)]
    if strange:
        raise Unfit(f"{strange[0]} has hooks, which own layers would not call")
    caps = sorted({key for layer in layers.values() for key in _caps(layer.self_attn)})
    if caps:
        raise Unfit(f"the config sets {', '.join(caps)}")
    kinds = {name: _kind(layer) for name, layer in layers.items()}
    firsts: dict[Any, str] = {}
    for name, kind in kinds.items():
        firsts.setdefault(kind, name)
    readings = {kind: list(_readings(layers[name])) for kind, name in firsts.items()}
    seen, rows = _watch(model, backbone, {name: layers[name] for name in firsts.values()})
    plans: dict[Any, Plan] = {}
    for kind, name in firsts.items():
        plans[kind] = _fitting(name, layers[name], readings[kind], seen[name], rows)
    return {name: plans[kind] for name, kind in kinds.items()}


def _hooked(part: nn.Module) -> bool:
    """Hooks on a linear layer or an adapter are seen at each call (decoder_layer.projection), on anything else they would be lost."""
    return not is_linear_like(part) and not hasattr(part, "lora_a") and watched(part)


def _caps(attention: Any) -> list[str]:
    """Settings of the architecture that bend scores in a way no reading knows."""
    config = getattr(attention, "config", None)
    set_ones = [key for key in inspect.signature(type(config)).parameters if CAPS.search(key) and getattr(config, key, None)]
    known = {"final_logit_softcapping", *(["attn_logit_softcapping"] if hasattr(attention, "attn_logit_softcapping") else [])}
    return [key for key in set_ones if key not in known]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Classes and plain settings of a layer's parts and its window; what numbers a layer is left out."""
    parts: list[Any] = [("window", _window(layer.self_attn), ())] if hasattr(layer.self_attn, "config") else []
    for name, module in layer.named_modules():
        if name.count(".") > 1:
            continue
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, bool, type(None)))}
        for numbered in ("layer_idx", "layer_id", "training"):
            plain.pop(numbered, None)
        parts.append((name, type(module), tuple(sorted(plain.items(), key=lambda item: item[0]))))
    return tuple((name, kind, tuple((key, str(value)) for key, value in plain)) for name, kind, plain in parts)


def _readings(layer: nn.Module) -> Iterator[Plan]:
    """Plans the names allow, the likely first.  Raises Unfit where a part is unknown."""
    attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
    assert isinstance(attention, nn.Module)
    parts = dict(attention.named_children())
    strange = [name for name in (*parts, *dict(attention.named_parameters(recurse=False))) if name not in ATTENTION_PARTS]
    qkv = ("qkv_proj",) if "qkv_proj" in parts else ("q_proj", "k_proj", "v_proj")
    if strange or any(name not in parts for name in (*qkv, "o_proj")):
        raise Unfit(f"{type(attention).__name__} has parts {', '.join(sorted({*parts, *strange})) or 'without names'}")
    if mlp is None:
        raise Unfit(f"{type(layer).__name__} has no mlp")
    if not getattr(attention, "is_causal", True):
        raise Unfit("attention looks ahead")
    if any(_drops(name, module) for name, module in layer.named_modules()):
        raise Unfit("the layer has dropout of its own")
    norms = {name for name, child in layer.named_children() if "norm" in name}
    beside = [name for name, child in layer.named_children() if not isinstance(child, (nn.Dropout, nn.Identity))]
    own = [*dict(layer.named_parameters(recurse=False)), *dict(layer.named_buffers(recurse=False)), *beside]
    unknown = sorted({*own} - {"self_attn", "mlp", *norms})
    if unknown:
        raise Unfit(f"{type(layer).__name__} has parts {', '.join(unknown)}")
    places = [place for place in NORM_PLACES if {name for name in place if name} == norms]
    if not places:
        raise Unfit(f"norms {', '.join(sorted(norms)) or 'without names'} are not placed in a known way")
    forms = {name: _form(getattr(layer, name)) for name in norms}
    forms.update({name: _form(getattr(attention, name)) for name in ("q_norm", "k_norm") if name in parts})
    head_dim, heads, groups = _heads(attention)
    widths = [heads + 2 * groups] if len(qkv) == 1 else [heads, groups, groups]
    if any(getattr(parts[name], "out_features", None) != width * head_dim for name, width in zip(qkv, widths)):
        raise Unfit(f"{type(attention).__name__} has projections of other widths than {heads} and {groups} heads of {head_dim}")
    inner = _inner(mlp)
    multiplier, softcap = getattr(layer, "residual_multiplier", 1.0), getattr(attention, "attn_logit_softcapping", None)
    for place, rotary, gated in product(places, (True, False), (_act(mlp), "") if inner else ("",)):
        yield Plan(
            place, qkv, inner if gated else (), _qk_norm(parts, attention, heads * head_dim, head_dim), forms, gated,
            float(multiplier), _window(attention), float(softcap or 0.0),
            float(attention.scaling), heads, groups, head_dim, rotary,  # type: ignore[arg-type]
        )  # fmt: skip


def _drops(name: str, module: nn.Module) -> bool:
    """A layer's own dropout, as a module or as a number; an adapter's is its own affair."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    own = ((key, value) for key, value in vars(module).items() if "dropout" in key and isinstance(value, float))
    return name.count(".") < 1 and any(value > 0 for _, value in own)


def _heads(attention: Any) -> tuple[int, int, int]:
    """(head width, query heads, key-value heads)."""
    config = getattr(attention, "config", None)
    head_dim, repeats = getattr(attention, "head_dim", None), getattr(attention, "num_key_value_groups", None)
    heads, scaling = getattr(config, "num_attention_heads", None), getattr(attention, "scaling", None)
    if not (isinstance(head_dim, int) and isinstance(repeats, int) and isinstance(heads, int) and isinstance(scaling, float)):
        raise Unfit(f"{type(attention).__name__} does not say head_dim, heads and scaling")
    return head_dim, heads, heads // repeats


def _window(attention: Any) -> int:
    """The layer's own sliding window, or the config's where the layer says nothing of its kind; 0 is none."""
    if hasattr(attention, "sliding_window"):
        return int(attention.sliding_window or 0) if getattr(attention, "is_sliding", True) else 0
    config = attention.config
    if "sliding_window" not in inspect.signature(type(config)).parameters:
        return 0  # a key that stands in config.json without meaning to this architecture
    types = getattr(config, "layer_types", None)
    if types is not None and types[attention.layer_idx] != "sliding_attention":
        if types[attention.layer_idx] != "full_attention":
            raise Unfit(f"attention of kind {types[attention.layer_idx]}")
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def _qk_norm(parts: dict[str, nn.Module], attention: nn.Module, width: int, head_dim: int) -> str:
    if "q_norm" not in parts:
        return ""
    size = parts["q_norm"].weight.numel()  # type: ignore[operator]
    return {head_dim: "head", width: "width"}.get(size, "") or _refuse(f"a query norm of {size} weights")


def _refuse(reason: str) -> str:
    raise Unfit(reason)


@torch.no_grad()
def _form(module: Any) -> int:
    """Which formula of kernels/rms_norm the module computes, tried on numbers of its own type."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or getattr(module, "bias", None) is not None:
        raise Unfit(f"{type(module).__name__} is no RMSNorm")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.numel(), generator=generator).to(weight.device, weight.dtype) * 3 + 1
    wanted = module(x)
    try:
        eps = epsilon(module)
    except TypeError as unknown:
        raise Unfit(str(unknown)) from None
    errors = [float((rms_norm(x, weight, eps, form)[0].float() - wanted.float()).abs().max()) for form in (0, 1, 2)]
    best = min(range(3), key=errors.__getitem__)
    if not errors[best] <= ROUNDINGS * torch.finfo(weight.dtype).eps * float(wanted.float().abs().max()):
        raise Unfit(f"{type(module).__name__} is no RMSNorm of a known form")
    return best


def _inner(mlp: nn.Module) -> tuple[str, ...]:
    """Names of the projections before the activation; nothing where the MLP is not a gated one of known parts."""
    linear = {name for name, _ in mlp.named_children() if name.endswith("_proj")}
    beside = [child for name, child in mlp.named_children() if name not in linear]
    if [*mlp.parameters(recurse=False), *mlp.buffers(recurse=False), *(own for child in beside for own in child.parameters())]:
        return ()  # a scale of ones would pass the probe and be lost when it learns
    known = ({"gate_proj", "up_proj", "down_proj"}, ("gate_proj", "up_proj")), ({"gate_up_proj", "down_proj"}, ("gate_up_proj",))
    return next((names for parts, names in known if parts == linear), ())


@torch.no_grad()
def _act(mlp: nn.Module) -> str:
    """Which activation the MLP's own function is; empty where it is another."""
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if function is None:
        return ""
    x = torch.linspace(-6, 6, 97)
    wanted, one = function(x), torch.ones_like(x)
    return next((act for act in ACTS if torch.allclose(gated_act(x, one, act), wanted, atol=2e-6)), "")


def _watch(model: Any, backbone: nn.Module, layers: dict[str, nn.Module]) -> tuple[dict[str, _Seen], Any]:
    """What each of `layers` got when two packed samples went through the original model."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[(7 * step + 3) % vocabulary for step in range(sum(TOKENS))]], device=device)
    positions = torch.cat([torch.arange(count, device=device) for count in TOKENS])[None]
    seen: dict[str, _Seen] = {}

    def note(name: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            others = {key: value for key, value in named.items() if key != "hidden_states"}
            seen[name] = _Seen(inputs[0] if inputs else named["hidden_states"], inputs[1:], others)

        return before

    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            backbone(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if set(seen) != set(layers):
        raise Unfit("some decoder layers are not called")
    rows = rows_from((1, sum(TOKENS)), None, positions)
    return seen, rows


def _wide(value: Any) -> Any:
    """Every floating-point tensor of fewer than 32 bits in a structure of arguments, widened."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_wide(item) for item in value)
    return {key: _wide(item) for key, item in value.items()} if isinstance(value, dict) else value


@torch.no_grad()
def _fitting(name: str, layer: nn.Module, readings: list[Plan], seen: _Seen, rows: Any) -> Plan:
    """The nearest reading that gives what the original gives, with the MLP in parts where that does.  Raises Unfit where none does."""
    narrow = any(parameter.is_floating_point() and parameter.dtype.itemsize < 4 for parameter in layer.parameters())
    exact = copy.deepcopy(layer).float() if narrow or seen.hidden.dtype.itemsize < 4 else layer
    hidden, others, named = _wide(seen.hidden), _wide(seen.others), _wide(seen.named)
    flat, angles = hidden.reshape(-1, hidden.shape[-1]), named.get("position_embeddings")
    with evaluating(exact):
        output = exact(hidden, *others, **named)
        wanted = (output[0] if isinstance(output, tuple) else output).reshape(flat.shape)
        tried = [plan for plan in readings if isinstance(angles, tuple) or not plan.rotary]
        differences = [float((run(exact, plan, flat, angles, rows, "keep") - wanted).abs().max()) for plan in tried]
    nearest = min(differences, default=float("inf"))
    allowed = LAYER_ROUNDINGS * torch.finfo(wanted.dtype).eps * max(float((wanted - flat).abs().max()), float(wanted.abs().max()) / 4)
    if not nearest <= allowed:
        raise Unfit(f"{type(layer).__name__} ({name}) computes something else: nearest {nearest:.2g}, allowed {allowed:.2g}")
    fitting = [number for number, difference in enumerate(differences) if difference <= allowed]
    return tried[min(fitting, key=lambda number: (not tried[number].gated, differences[number]))]


__all__ = ["POLICIES", "Fused", "Unfit", "decoder_layers", "fuse", "is_fused", "set_policy"]
