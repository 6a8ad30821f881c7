"""One token through a decoder layer as a list of kernels whose arguments are in place.

Asking PyTorch for a layer's twenty small results takes longer than reading the weights of a small layer.  So the
calls are prepared once for a layer: buffers for one row, weights by their addresses.  A step then runs down the list.

    norm, order, q k v (+ bias) (+ adapter), q/k norm, rotary | the cache takes k and v | attention, order, o, norm of the sum, order,
    gate up, act, order, down, + sum

Same roundings as the ordinary way of `decoder_layer.run`, in other words the same numbers but for the order of sums.  It is made for
what most models are: bfloat16, packed 4-bit weights, a gated MLP, norms before attention and MLP, plain adapters.  For everything else
`prepared` gives None and the layer decodes in the ordinary way.  What may change between two steps (norms, biases, adapters) is read anew
at each; a list is thrown away where a part was exchanged, a packed weight has moved, or somebody looks at a layer's calls.  One thread at
a time uses a list, another one that comes meanwhile decodes in the ordinary way.

H width, D head width, I inner width; one sequence.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels import listing
from halfbyte.kernels.cached_attention.cpu import attend_heads
from halfbyte.kernels.gated_mlp import ACTS
from halfbyte.kernels.gated_mlp.cpu import act_rows
from halfbyte.kernels.matmul_4bit.cpu import bound_row, order
from halfbyte.kernels.native import Bound
from halfbyte.kernels.rms_norm.cpu import norm_rows
from halfbyte.kernels.rope.cpu import turn
from halfbyte.lora.layer import LoraLinear
from halfbyte.models.rows import Step, epsilon, watched
from halfbyte.quant.linear import QuantLinear

Call = Callable[[], Any]
OPS = ("matmul_4bit", "rms_norm", "rope", "gated_mlp", "cached_attention")
LIST = "decode_list"
NEVER = object()


class _Unfit(Exception):
    """A part that no list is made for."""


@dataclass(frozen=True)
class Place:
    """A part that a list uses, where it hangs, and the addresses of its packed tensors."""

    parent: nn.Module
    name: str
    part: nn.Module
    addresses: tuple[int, ...]

    def is_current(self) -> bool:
        """The part still hangs there, its tensors lie where they lay, and nobody looks at its calls."""
        return self.parent._modules.get(self.name) is self.part and _addresses(self.part) == self.addresses


@dataclass
class LayerStep:
    """The prepared calls of one layer.

    before   from the hidden state x to queries, keys and values; `first` of them reads x
    after    from the attention's result to the MLP's; `sums` adds x to the attention's part
    places   what the list points to
    """

    before: list[Call]
    first: Bound
    turned: Bound
    keys: Tensor
    values: Tensor
    attend: Bound
    after: list[Call]
    sums: Bound
    summed: Tensor
    out: Tensor
    places: list[Place]
    threads: int
    scratch: Tensor
    lock: Any = field(default_factory=threading.Lock)

    def is_current(self) -> bool:
        """All parts are as they were, and there are as many threads."""
        return self.threads == torch.get_num_threads() and all(place.is_current() for place in self.places)

    def run(self, x: Tensor, plan: Any, attention: Any, angles: Any, step: Step) -> Tensor:
        """(1, H) -> (1, H).  Lets go of the lock that `prepared` took."""
        try:
            return self._run(x.contiguous(), plan, attention, angles, step)
        finally:
            self.lock.release()

    def _run(self, x: Tensor, plan: Any, attention: Any, angles: Any, step: Step) -> Tensor:
        self.first.point("summed", x)
        self.sums.point("x", x)
        for call in self.before:
            call()
        if plan.rotary:
            cos, sin = step.angles(angles)
            self.turned.point("cos", cos)
            self.turned.point("sin", sin)
            self.turned()
        keys, values = step.cache.update(self.keys, self.values, attention.layer_idx)
        if 0 < plan.window < keys.shape[2]:
            keys, values = keys[:, :, -plan.window :], values[:, :, -plan.window :]
        keys, values = keys.contiguous(), values.contiguous()
        tokens = keys.shape[2]
        self._make_room(plan, tokens)
        self.attend.point("k", keys)
        self.attend.point("v", values)
        self.attend.set("tokens", tokens)
        self.attend()
        for call in self.after:
            call()
        return self.summed + self.out

    def _make_room(self, plan: Any, tokens: int) -> None:
        needed = plan.heads * (tokens + plan.head_dim)
        if self.scratch.numel() < needed:
            self.scratch = torch.empty(2 * needed)
            self.attend.point("scratch", self.scratch)


def prepared(layer: Any, x: Tensor, step: Any, angles: Any) -> LayerStep | None:
    """The layer's list for x (1, H), locked, made now where there is none or it is out of date; None where the layer is not one for it."""
    if not isinstance(step, Step) or x.shape[0] != 1 or x.dtype != torch.bfloat16 or torch.is_grad_enabled() or layer.training:
        return None
    known = layer.__dict__.get(LIST, NEVER)
    if known is NEVER or (known is not None and not known.is_current()):
        try:
            known = _made(layer, layer.plan, x, angles)
        except _Unfit:
            known = None
        layer.__dict__[LIST] = known
    return known if known is not None and known.lock.acquire(blocking=False) else None


def _addresses(module: Any) -> tuple[int, ...]:
    """Where a packed layer is read from, 0 for another; nothing for a layer that is looked at, which is called as a module."""
    if watched(module):
        return ()
    return (module.weight.data_ptr(), module.absmax.data_ptr()) if isinstance(module, QuantLinear) else (0,)


class _Parts:
    """Collects calls and what they point to."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    def part(self, parent: nn.Module, name: str) -> Any:
        """The part of that name, noted.  Raises _Unfit for one whose calls are looked at."""
        part = getattr(parent, name)
        place = Place(parent, name, part, _addresses(part))
        if not place.addresses:
            raise _Unfit
        self.places.append(place)
        return part

    def norm(
        self, parent: nn.Module, name: str, form: int, x: Tensor, y: Tensor, residual: Tensor | None = None, summed: Tensor | None = None
    ) -> tuple[Call, Bound]:
        """y = norm of x's rows, or of x + residual, which goes to `summed`; the first call reads the weight."""
        module = self.part(parent, name)
        weight = torch.empty(module.weight.numel())
        eps = epsilon(module)
        rows, added = x.numel() // weight.numel(), residual is not None
        rstd, target = torch.empty(rows), x if summed is None else summed
        bound = norm_rows.bind(rows, x if added else None, residual, target, weight, y, rstd, weight.numel(), eps, added, form == 0)
        shift = 1.0 if form == 2 else 0.0
        return (lambda: torch.add(module.weight, shift, out=weight)) if shift else (lambda: weight.copy_(module.weight)), bound

    def products(self, parent: nn.Module, names: Sequence[str], x: Tensor, outputs: list[Tensor]) -> list[Call]:
        """Each named layer's row of x (I,), bias and adapter included."""
        if x.numel() % 64:
            raise _Unfit
        ordered = torch.empty_like(x)
        calls: list[Call] = [order.bind(x.numel() // 64, x, ordered)]
        for name, y in zip(names, outputs):
            module = self.part(parent, name)
            base = self.part(module, "base") if isinstance(module, LoraLinear) else module
            if not isinstance(base, QuantLinear) or base.format == "int8" or base.compute_dtype is not None:
                raise _Unfit
            bound = bound_row(ordered, y, *base.product_arguments())
            if bound is None or y.numel() != base.out_features:
                raise _Unfit
            calls.append(bound)
            if base.bias is not None:
                calls.append(_bias(base, y))
            if module is not base:
                calls.append(_update(module, x, y))
        return calls


def _bias(module: Any, y: Tensor) -> Call:
    return lambda: y.add_(module.bias.to(y.dtype))


def _update(module: LoraLinear, x: Tensor, y: Tensor) -> Call:
    if module.magnitude is not None or module.lora_bias is not None:
        raise _Unfit
    row, result = x[None], y[None]

    def update() -> None:
        lora_a, lora_b = module.factors()
        result.addmm_(torch.nn.functional.linear(row, lora_a.to(row.dtype)), lora_b.to(row.dtype).T, alpha=module.scaling)

    return update


@torch.inference_mode(False)
@torch.no_grad()
def _made(layer: Any, plan: Any, x: Tensor, angles: Any) -> LayerStep:
    """Raises _Unfit where a part is not known.  Its buffers are ordinary tensors, which every later step may write to."""
    before, after, before_mlp, after_mlp = plan.norms
    if not (before and before_mlp and plan.gated) or after or after_mlp or plan.multiplier != 1.0 or plan.qk_norm == "width":
        raise _Unfit
    if any(listing.chosen(op, "cpu") != "cpu" for op in OPS):
        raise _Unfit
    parts = _Parts()
    attention, mlp = parts.part(layer, "self_attn"), parts.part(layer, "mlp")
    width, wide, narrow = x.shape[1], plan.heads * plan.head_dim, plan.groups * plan.head_dim

    def row(size: int) -> Tensor:
        return torch.empty(size, dtype=x.dtype)

    normed, qkv, turned = row(width), row(wide + 2 * narrow), row(wide + narrow)
    read, first = parts.norm(layer, before, plan.forms[before], row(width), normed)
    pieces = [qkv] if len(plan.qkv) == 1 else list(qkv.split([wide, narrow, narrow]))
    calls: list[Call] = [read, first, *parts.products(attention, plan.qkv, normed, pieces)]
    straight = qkv
    if plan.qk_norm == "head":
        straight = row(wide + narrow)
        for name, piece in (("q_norm", slice(0, wide)), ("k_norm", slice(wide, wide + narrow))):
            calls += parts.norm(attention, name, plan.forms[name], qkv[piece], straight[piece])
    held = turned if plan.rotary else straight
    rotated = angles[0].shape[-1] if plan.rotary else plan.head_dim
    table = torch.empty(rotated)
    heads = plan.heads + plan.groups
    rope = turn.bind(1, straight, turned, table, table, heads, plan.head_dim, rotated, heads * plan.head_dim, plan.head_dim, False, work=0)
    keys = held[wide : wide + narrow].view(1, plan.groups, 1, plan.head_dim)
    values = qkv[wide + narrow :].view(1, plan.groups, 1, plan.head_dim)
    o, delta, summed, h = row(wide), row(width), row(width), row(width)
    repeats = plan.heads // plan.groups
    scratch = torch.empty(plan.heads * (256 + plan.head_dim))
    attend = attend_heads.bind(
        plan.heads, held[:wide], keys, values, o, scratch, repeats, 1, plan.head_dim, plan.scaling, plan.softcap, work=1 << 20
    )
    read, sums = parts.norm(layer, before_mlp, plan.forms[before_mlp], row(width), h, delta, summed)
    inside = sum(getattr(mlp, name).out_features for name in plan.inner) // 2
    both, act, out = row(2 * inside), row(inside), row(width)
    gate, up = both.split(inside)
    tail: list[Call] = [*parts.products(attention, ("o_proj",), o, [delta]), read, sums]
    tail += parts.products(mlp, plan.inner, h, [both] if len(plan.inner) == 1 else [gate, up])
    tail.append(act_rows.bind(1, gate, up, act, inside, inside, inside, ACTS.index(plan.gated), work=0))
    tail += parts.products(mlp, ("down_proj",), act, [out])
    return LayerStep(
        calls, first, rope, keys, values, attend, tail, sums, summed[None], out[None], parts.places, torch.get_num_threads(), scratch
    )

