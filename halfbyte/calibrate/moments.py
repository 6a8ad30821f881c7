"""Second moments of what goes into each layer, from forward passes over a few rows: how much an error in each weight matters.

    moments(layer)    sum over tokens of x_I x_I^T (I, I), or of x_I^2 (I,) alone where the square would be too large to hold
    output error      sum over tokens of |E x|^2 = tr(E M E^T) for an error E (O, I) of the layer's weight: no activation is kept

Layers that read the same tensor (query, key and value; gate and up) share one sum.  Every CHECK_EVERY-th row goes into a second sum of
its own: what was fitted to the first is judged by the second.  Memory is bounded: layers are taken in groups whose sums fit MOMENTS_BYTES,
and each group costs one forward pass, which ends at the group's last layer.

Rows go through the model one by one, so there is no padding to leave out.  Does not change the model.
Source: https://arxiv.org/abs/2306.00978 (activations decide which weights matter), https://arxiv.org/abs/2210.17323 (X X^T of each layer)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.models.modes import evaluating
from halfbyte.quant.dense import shape_of

MOMENTS_BYTES = 1 << 30
"""Bytes of sums that are held at a time; both sums of an input of width I take 8 I^2."""
CHECK_EVERY = 5


@dataclass(frozen=True)
class Moments:
    """Sums over `tokens` inputs: `diagonal` (I,), `square` (I, I) or None, both float32."""

    diagonal: Tensor
    square: Tensor | None
    tokens: int

    def error(self, gap_OI: Tensor) -> float:
        """Sum over the tokens of |gap x|^2; without the square, as if the inputs were uncorrelated."""
        if self.square is None:
            return float((gap_OI.float().square() @ self.diagonal).sum(dtype=torch.float64))
        return float(((gap_OI.float() @ self.square) * gap_OI).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Seen:
    """What a layer was given: the rows that are fitted, and the rows that judge."""

    fit: Moments
    check: Moments


class _Sum:
    """The sums of one input under way."""

    def __init__(self, width: int, square: bool) -> None:
        self.diagonal, self.square = torch.zeros(width), torch.zeros(width, width) if square else None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x_TI = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += x_TI.shape[0]
        if self.square is None:
            self.diagonal = self.diagonal.to(x_TI.device) + x_TI.square().sum(0)
        else:
            self.square = self.square.to(x_TI.device).addmm_(x_TI.T, x_TI)

    def moments(self) -> Moments:
        square = None if self.square is None else self.square.cpu()
        return Moments(self.diagonal.cpu() if square is None else square.diagonal().clone(), square, self.tokens)


class _Enough(Exception):
    """The last layer of a group has been reached; the rest of the forward pass is not needed."""


def collect(
    model: nn.Module, names: Sequence[str], rows: Sequence[Sequence[int]], *, bytes_at_once: int = MOMENTS_BYTES
) -> Iterator[dict[str, Seen]]:
    """Yield name -> Seen for groups of the linear layers `names`; together the groups hold every layer that the rows reached.

    rows  token ids, each of one text.  The yielded sums are not used again here, so the caller may free them.
    """
    layers = {name: model.get_submodule(name) for name in names}
    reached = _leaders(model, layers, rows)
    # one that only a later row reaches, an expert of a mixture, has a sum of its own and no known place in the order
    leaders = reached | {name: name for name in layers if name not in reached}
    groups = _groups({name: shape_of(layers[name])[1] for name in dict.fromkeys(leaders.values())}, bytes_at_once)
    for group in groups:
        ends = group[-1] if group[-1] in reached else ""
        sums = _one_pass(model, {name: layers[name] for name in group}, ends, rows, bytes_at_once)
        yield {
            name: Seen(sums[leader][0].moments(), sums[leader][1].moments())
            for name, leader in leaders.items()
            if leader in sums and sums[leader][0].tokens and sums[leader][1].tokens
        }


def _leaders(model: nn.Module, layers: Mapping[str, nn.Module], rows: Sequence[Sequence[int]]) -> dict[str, str]:
    """name -> the layer whose input it shares, in the order of calls, for the layers that the first row reaches."""
    found: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0] is not last[0]:
                last[0], last[1] = inputs[0], name
            found.setdefault(name, last[1])

        return hook

    _forward(model, {name: note(name) for name in layers}, layers, rows[:1])
    return found


def _groups(widths: Mapping[str, int], bytes_at_once: int) -> list[list[str]]:
    """Names in their order, cut so that the sums of each group fit; one alone may be larger, it then keeps its diagonal only."""
    groups: list[list[str]] = []
    room = 0
    for name, width in widths.items():
        size = min(8 * width * width, bytes_at_once)
        if not groups or size > room:
            groups.append([])
            room = bytes_at_once
        groups[-1].append(name)
        room -= size
    return groups


def _one_pass(
    model: nn.Module, group: Mapping[str, nn.Module], ends: str, rows: Sequence[Sequence[int]], bytes_at_once: int
) -> dict[str, tuple[_Sum, _Sum]]:
    """leader -> (sum over the rows to fit, sum over the rows to check); each row ends at the layer `ends`, if one is named."""
    sums = {}
    for name, layer in group.items():
        width = shape_of(layer)[1]
        sums[name] = (_Sum(width, 8 * width * width <= bytes_at_once), _Sum(width, 8 * width * width <= bytes_at_once))
    part = 0

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            sums[name][part].add(inputs[0])
            if name == ends:
                raise _Enough

        return hook

    hooks = {name: add(name) for name in group}
    for number, row in enumerate(rows):
        part = 1 if number % CHECK_EVERY == CHECK_EVERY - 1 else 0
        _forward(model, hooks, group, [row])
    return sums


@torch.inference_mode()
def _forward(model: nn.Module, hooks: Mapping[str, Any], layers: Mapping[str, nn.Module], rows: Sequence[Sequence[int]]) -> None:
    """The backbone over each row, with a hook before each layer; the hooks are gone afterwards."""
    backbone: Any = model.base_model
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, hook in hooks.items():
            stack.callback(layers[name].register_forward_pre_hook(hook).remove)
        for row in rows:
            try:
                backbone(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
            except _Enough:
                continue
