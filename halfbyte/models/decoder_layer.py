"""A decoder layer on Halfbyte's own ops, in the place of transformers' and with the same children, names and results.

    x ── norm ── q k v ── (q/k norm) ── rotary ── attention ── o ── (norm) ── + x = s ── norm ── gate up ── act ── down ── (norm) ── + s

The layer that stood there is taken over, not wrapped: an instance of a subclass of its own class that shares its children, parameters and
hooks, so names, checkpoints, adapters and isinstance are as before, and everything this layer does not do itself (a cache, generation,
dense masks) is the inherited forward.  Which inputs it does itself the mask says: `models/rows.py` sends one along that knows where
each sample begins and ends.  What the layer is made of was found by `models/structure.py` and probed against the original.

What is kept for the backward pass says the policy (models/recompute.py).  A linear layer that is not a plain frozen one with a plain
update (DoRA, active dropout, a trained weight) is called as a module, and autograd keeps what it needs.
B sequences, T tokens, H width, D head width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.gated_mlp import gated_act
from halfbyte.kernels.gated_mlp.block import Mlp, gated_mlp, without_down
from halfbyte.kernels.lora_linear import Norm, Projection, lora_linear
from halfbyte.kernels.matmul_4bit import matmuls_4bit
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm
from halfbyte.kernels.rope import rope
from halfbyte.lora.layer import LoraLinear
from halfbyte.models.decode_step import LIST, prepared
from halfbyte.models.rows import FEW, Rows, Step, epsilon, rows_of, watched
from halfbyte.quant.dense import dense_weight, is_conv1d, is_linear_like
from halfbyte.quant.linear import QuantLinear

POLICIES = ("keep", "recompute_mlp", "recompute", "offload")


@dataclass(frozen=True)
class Plan:
    """What a layer is made of: names of its parts, as `structure.fuse` found them.  Norm names are of the layer; "" is none.

    norms       before attention, after it, before the MLP, after it
    qk_norm     "", "head" (each head by itself) or "width" (all heads as one row)
    forms       norm name -> form of kernels/rms_norm, also "q_norm" and "k_norm"
    gated       activation of a gated MLP with known parts; "" calls the MLP as a module
    multiplier  of what attention and MLP add to the residual stream
    """

    norms: tuple[str, str, str, str]
    qkv: tuple[str, ...]
    inner: tuple[str, ...]
    qk_norm: str
    forms: dict[str, int]
    gated: str
    multiplier: float
    window: int
    softcap: float
    scaling: float
    heads: int
    groups: int
    head_dim: int
    rotary: bool = True

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Names of the parts whose numbers are used and whose forward is not called."""
        norms = [name for name in self.norms if name]
        return (*norms, *(f"self_attn.{name}" for name in self.forms if name not in norms), "self_attn", *(["mlp"] if self.gated else []))


class FusedLayer:
    """The forward; `class_for` joins it with the class of the layer it takes over."""

    plan: Plan
    policy: str
    kinds: dict[str, type]

    def forward(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        """(B, T, H) -> (B, T, H) on own ops where the mask carries rows; else what the original does."""
        mask = named.get("attention_mask")
        rows = rows_of(mask)
        if rows is None:
            return super().forward(hidden_states, *inputs, **named)  # type: ignore[misc]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        angles = named.get("position_embeddings")
        if self.policy in ("recompute", "offload") and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            return _again(self, x, angles, rows).view_as(hidden_states)
        step = prepared(self, x, rows, angles)
        if step is not None:
            return step.run(x, self.plan, self.self_attn, angles, rows).view_as(hidden_states)  # type: ignore[arg-type, attr-defined]
        return run(self, self.plan, x, angles, rows, self.policy).view_as(hidden_states)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """How it is copied and sent to another process, where its class is made again."""
        return empty, (type(self).__mro__[2],), {name: value for name, value in self.__dict__.items() if name != LIST}


def _again(layer: Any, x: Tensor, angles: Any, rows: Rows | Step) -> Tensor:
    """The layer with nothing kept but x, on the host where the policy says so; its last product is not repeated."""
    away = save_on_cpu(pin_memory=True) if layer.policy == "offload" and x.is_cuda else nullcontext()
    with away:
        out = checkpoint(
            run, layer, layer.plan, x, angles, rows, "recompute_mlp", use_reentrant=False,
            context_fn=lambda: (nullcontext(), without_down()),
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


@cache
def class_for(original: Any) -> Any:
    """The subclass of a decoder layer's class that runs on own ops."""
    return type(original.__name__, (FusedLayer, original), {"__module__": __name__})  # by name it is found as the one it stands for


def empty(original: Any) -> Any:
    """An instance of the subclass without anything in it."""
    kind = class_for(original)
    return kind.__new__(kind)


def take_over(original: nn.Module, plan: Plan, policy: str = "keep") -> nn.Module:
    """A layer that shares everything with `original` and runs as `plan` says."""
    layer = empty(type(original))
    layer.__dict__.update(original.__dict__)
    layer.__dict__["plan"], layer.__dict__["policy"] = plan, policy
    layer.__dict__["kinds"] = {name: type(original.get_submodule(name)) for name in plan.passed_over}
    return layer


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> layer of a numbered list, for all that hold an attention."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "self_attn", None), nn.Module) and name.rpartition(".")[2].isdigit()
    }


def run(layer: Any, plan: Plan, x: Tensor, angles: Any, rows: Rows | Step, policy: str) -> Tensor:
    """One layer on the flat tokens x (T, H)."""
    before, after, before_mlp, after_mlp = (getattr(layer, name) if name else None for name in plan.norms)
    attention = layer.self_attn
    q, k, v = _query_key_value(attention, plan, x, before)
    tokens = x.shape[0]
    q, k, v = q.view(tokens, plan.heads, -1), k.view(tokens, plan.groups, -1), v.view(tokens, plan.groups, -1)
    if plan.qk_norm == "head":
        q, k = (_normed(getattr(attention, name), plan.forms[name], part) for name, part in (("q_norm", q), ("k_norm", k)))
    if plan.rotary:
        cos, sin = rows.angles(angles)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
    o = rows.attend(attention, plan, q, k, v).reshape(tokens, -1)
    delta = linears((attention.o_proj,), o)[0]
    if after is not None:
        delta = _normed(after, plan.forms[plan.norms[1]], delta)
    if plan.multiplier != 1.0:
        delta = delta * plan.multiplier
    return _mlp(layer, plan, x, delta, before_mlp, after_mlp, policy)


def _query_key_value(attention: Any, plan: Plan, x: Tensor, before: nn.Module | None) -> tuple[Tensor, ...]:
    modules = tuple(getattr(attention, name) for name in plan.qkv)
    parts = linears(modules, x, None if before is None else (before, plan.forms[plan.norms[0]]))
    if len(parts) == 1:
        wide, narrow = plan.heads * plan.head_dim, plan.groups * plan.head_dim
        parts = tuple(part.contiguous() for part in parts[0].split([wide, narrow, narrow], dim=-1))
    if plan.qk_norm == "width":
        q, k = (_normed(getattr(attention, name), plan.forms[name], part) for name, part in (("q_norm", parts[0]), ("k_norm", parts[1])))
        return q, k, parts[2]
    return parts


def _mlp(layer: Any, plan: Plan, x: Tensor, delta: Tensor, before: Any, after: Any, policy: str) -> Tensor:
    """The residual stream after attention and MLP have been added."""
    mlp = layer.mlp
    if plan.gated and before is not None and after is None and plan.multiplier == 1.0 and frozen(before) and not _few(x):
        inner, down = [projection(getattr(mlp, name)) for name in plan.inner], projection(mlp.down_proj)
        if down is not None and None not in inner:
            known = Mlp(tuple(part for part in inner if part is not None), down, plan.gated)
            return gated_mlp(x, delta, norm_of(before, plan.forms[plan.norms[2]]), known, keep=policy == "keep")
    if before is None:
        summed = x + delta
        normed = summed
    else:
        summed, normed, _ = add_rms_norm(x, delta, before.weight, epsilon(before), plan.forms[plan.norms[2]])
    if plan.gated:
        parts = linears(tuple(getattr(mlp, name) for name in plan.inner), normed)
        gate, up = parts if len(parts) == 2 else (half.contiguous() for half in parts[0].chunk(2, dim=-1))
        out = linears((mlp.down_proj,), gated_act(gate, up, plan.gated))[0]
    else:
        out = mlp(normed[None])
        out = (out[0] if isinstance(out, tuple) else out)[0]
    if after is not None:
        out = _normed(after, plan.forms[plan.norms[3]], out)
    return summed + (out if plan.multiplier == 1.0 else out * plan.multiplier)


def linears(modules: tuple[nn.Module, ...], x: Tensor, norm: tuple[nn.Module, int] | None = None) -> tuple[Tensor, ...]:
    """What several linear layers make of one (normalised) input, in one function where all are plain, else one call each."""
    known = [projection(module) for module in modules]
    if None not in known and _few(x):
        return _step(modules, known, x if norm is None else _normed(norm[0], norm[1], x))
    if None not in known and (norm is None or frozen(norm[0])):
        normed = None if norm is None else norm_of(*norm)
        return lora_linear(x, [part for part in known if part is not None], normed)
    h = x if norm is None else _normed(norm[0], norm[1], x)
    return tuple(module(h) for module in modules)


def _few(x: Tensor) -> bool:
    """So few rows, without gradient on the CPU, that packed weights are multiplied as they lie there."""
    return x.shape[0] <= FEW and not torch.is_grad_enabled() and x.device.type == "cpu"


def _step(modules: tuple[nn.Module, ...], known: list[Projection | None], h: Tensor) -> tuple[Tensor, ...]:
    """The products of a few rows; packed weights share the order that the rows are brought into."""
    bases = [module.base if isinstance(module, LoraLinear) else module for module in modules]
    if not all(isinstance(base, QuantLinear) and base.format != "int8" for base in bases):
        return tuple(module(h) for module in modules)
    made = []
    for y, part in zip(matmuls_4bit(h, [base.product_arguments() for base in bases]), known):  # type: ignore[operator]
        assert part is not None
        y = y if part.bias is None else y + part.bias.to(y.dtype)
        if part.factors:
            lora_a, lora_b = (factor.to(y.dtype) for factor in part.factors)
            y = torch.addmm(y, F.linear(h, lora_a), lora_b.T, alpha=part.scaling)
        made.append(y)
    return tuple(made)


def projection(module: nn.Module) -> Projection | None:
    """A frozen linear layer, adapted or not, as data; None where only the module itself knows what it does."""
    if isinstance(module, LoraLinear):
        if module.magnitude is not None or module.lora_bias is not None or (module.training and module.dropout > 0) or watched(module):
            return None
        below = projection(module.base)
        return None if below is None else Projection(below.weight, below.bias, tuple(module.factors()), module.scaling)
    if not is_linear_like(module) or not frozen(module) or watched(module):
        return None
    if getattr(module, "compute_dtype", None) is not None:
        return None
    return Projection(weight_of(module), getattr(module, "bias", None))


def weight_of(module: nn.Module) -> Callable[[torch.dtype], Tensor]:
    """dtype -> the dense weight (O, I), made at each call where it is packed."""
    if is_conv1d(module) or isinstance(module, nn.Linear):
        return lambda dtype: dense_weight(module, dtype)
    return lambda dtype: dense_weight(module).to(dtype)  # a packed weight has the values of the type it had before


def frozen(module: nn.Module) -> bool:
    """No parameter of it asks for a gradient."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def norm_of(module: nn.Module, form: int) -> Norm:
    """An RMSNorm as data."""
    return Norm(module.weight, epsilon(module), form)  # type: ignore[arg-type]


def _normed(module: nn.Module, form: int, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, epsilon(module), form)[0]  # type: ignore[arg-type]
