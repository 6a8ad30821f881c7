"""Fold one adapter into its base weights, and back, and say how much rounding that introduced.

    W' = round(W + scaling * B A)          DoRA: W' = round(g * (W + scaling * B A)),  g = magnitude / row norm

A merged layer is a *new* dense layer in the base's type; the base object is left as it is, so `unmerge` puts it back to the bit.
A packed base is dequantized and stays dense: W is then exactly what the adapter was trained on, and nothing is ever quantized again.
A model whose output head shares its table with the embedding is untied when one of the two changes, and its config says so.

After folding, every layer is read back from the tree and compared with base + delta; a merge that lost one raises.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.errors import AdapterError
from halfbyte.lora.embedding import LoraEmbedding
from halfbyte.lora.experts import LoraExperts
from halfbyte.lora.inject import WRAPPERS, trained_parts, updates
from halfbyte.lora.layer import LoraLinear
from halfbyte.lora.targets import output_embedding
from halfbyte.lora.trained import TrainedParts
from halfbyte.lora.variants import merged_weight
from halfbyte.quant.dense import dense_weight, with_weight
from halfbyte.quant.dense_experts import dense_fused, with_expert_weights
from halfbyte.quant.experts import dense_expert
from halfbyte.surgery import modules_of, replace


@dataclass(frozen=True)
class MergedTensor:
    """One folded weight: the length of what was added, and the largest rounding error of a single weight."""

    name: str
    delta_norm: float
    rounding_error: float


@dataclass(frozen=True)
class MergeReport:
    """tensors: one entry per folded weight; taken_out: wrappers by name, for `unmerge`; untied: the config was changed."""

    tensors: tuple[MergedTensor, ...]
    taken_out: dict[str, nn.Module]
    put_in: dict[str, nn.Module]
    untied: bool

    @property
    def count(self) -> int:
        """How many weights were changed."""
        return len(self.tensors)

    @property
    def rounding_error(self) -> float:
        """The largest rounding error of a single weight over all tensors."""
        return max((tensor.rounding_error for tensor in self.tensors), default=0.0)


@torch.no_grad()
def merge(model: nn.Module) -> MergeReport:
    """Replace every adapted layer by a dense one that acts the same; in place.  AdapterError where there is nothing to merge.

    Only one dense copy of a layer exists beside the model at any time, apart from what `taken_out` keeps for `unmerge`.
    """
    expected = set(updates(model)) | {f"{name}:{part}" for name, module in trained_parts(model).items() for part in module.names}
    if not expected:
        raise AdapterError("only a model with an adapter can be merged", code="E-ADAPT-020", found=type(model).__name__,
                           remedy="load an adapter first", nothing_done="Nothing was merged.")  # fmt: skip
    wrappers = list(modules_of(model, lambda _, module: isinstance(module, WRAPPERS)))
    outer = [(name, module) for name, module in wrappers if not any(name.startswith(other + ".") for other, _ in wrappers)]
    entries: list[MergedTensor] = []
    put_in: dict[str, nn.Module] = {}
    for name, module in outer:
        put_in[name] = FOLDS[type(module)](module)
        replace(model, name, put_in[name])
        entries += check(name, module, model.get_submodule(name))
    done = [entry.name for entry in entries]
    if sorted(done) != sorted(expected):
        lost = sorted(expected - set(done))
        raise AdapterError("a merge must apply every delta", code="E-ADAPT-021", found=f"{len(done)} of {len(expected)} applied",
                           place=", ".join(lost[:5]))  # fmt: skip
    return MergeReport(tuple(entries), dict(outer), put_in, untie(model))


def fold_linear(layer: nn.Module) -> nn.Module:
    """LoraLinear -> the dense layer of the base's kind and type."""
    assert isinstance(layer, LoraLinear)
    weight = dense_weight(layer.frozen_base)
    bias = layer.bias
    if layer.lora_bias is not None:
        extra = layer.lora_bias.float() * layer.scaling
        bias = (extra if bias is None else bias.float() + extra).to(weight.dtype)
    return with_weight(layer.frozen_base, expected_linear(layer).to(weight.dtype), bias)


def expected_linear(layer: LoraLinear) -> Tensor:
    """(O, I) float32: what the folded weight is before rounding."""
    return merged_weight(dense_weight(layer.frozen_base), layer.delta_weight(), layer.magnitude)


def expected_embedding(layer: LoraEmbedding) -> Tensor:
    """(V, O) float32."""
    return merged_weight(layer.base.weight.T, layer.delta_weight().T, layer.magnitude).T


def fold_embedding(layer: nn.Module) -> nn.Module:
    """LoraEmbedding -> an embedding of the base's class with its own table."""
    assert isinstance(layer, LoraEmbedding)
    return with_parameters(layer.base, {"weight": expected_embedding(layer)})


def fold_trained(layer: nn.Module) -> nn.Module:
    """TrainedParts -> the base's class with the trained values."""
    assert isinstance(layer, TrainedParts)
    return with_parameters(layer.base, dict(layer.current()))


def with_parameters(base: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy of `base` in which these parameters have these values, rounded to their types; the rest is shared."""
    own = dict(base.named_parameters())
    memo = {id(parameter): parameter for parameter in own.values()}
    for name, value in values.items():
        memo[id(own[name])] = nn.Parameter(value.detach().to(own[name].dtype, copy=True).contiguous(), requires_grad=False)
    return copy.deepcopy(base, memo)


def expected_experts(layer: LoraExperts, name: str) -> Tensor:
    """(E, O, I) float32."""
    return dense_fused(layer.base, name, torch.float32) + layer.named_updates()[name].delta_weight()


def fold_experts(layer: nn.Module) -> nn.Module:
    """LoraExperts -> stock dense experts."""
    assert isinstance(layer, LoraExperts)
    dtype = dense_expert(layer.base, "down_proj", 0).dtype
    return with_expert_weights(layer.base, {name: expected_experts(layer, name).to(dtype) for name in layer.named_updates()})


FOLDS: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    LoraLinear: fold_linear, LoraEmbedding: fold_embedding, LoraExperts: fold_experts, TrainedParts: fold_trained,
}  # fmt: skip


def check(name: str, wrapper: nn.Module, folded: nn.Module) -> list[MergedTensor]:
    """Compare the layer that is now in the tree with base + delta, within the rounding of its type."""
    entries = []
    if isinstance(wrapper, LoraLinear):
        entries.append(measured(name, expected_linear(wrapper), dense_weight(folded), dense_weight(wrapper.frozen_base)))
        if isinstance(wrapper.base, TrainedParts):
            entries.append(MergedTensor(f"{name}:bias", 0.0, 0.0))
    elif isinstance(wrapper, LoraEmbedding):
        entries.append(measured(name, expected_embedding(wrapper), folded.get_parameter("weight"), wrapper.base.weight))
    elif isinstance(wrapper, LoraExperts):
        for part in wrapper.named_updates():
            expected, found = expected_experts(wrapper, part), dense_fused(folded, part)
            entries.append(measured(f"{name}.{part}", expected, found, dense_fused(wrapper.base, part)))
    elif isinstance(wrapper, TrainedParts):
        for part, value in wrapper.trained().items():
            before = wrapper.base.get_parameter(part)
            entries.append(measured(f"{name}:{part}", value, folded.get_parameter(part), before))
    return entries


def measured(name: str, expected: Tensor, found: Tensor, before: Tensor) -> MergedTensor:
    """The entry of one folded tensor; AdapterError where it is further from `expected` than rounding explains."""
    error = (found.float() - expected.float()).abs()
    half_step = torch.finfo(found.dtype).eps / 2
    allowed = expected.float().abs() * half_step * 1.01 + torch.finfo(found.dtype).tiny
    if not bool((error <= allowed).all()):
        raise AdapterError(
            "a merged weight must be base + delta to within rounding", code="E-ADAPT-022", place=name,
            found=f"off by {float(error.nan_to_num(torch.inf).max()):.3g}", expected=f"at most {float(allowed.max()):.3g}",
            remedy="a number that is not finite in the adapter or the base explains this; otherwise report it",
        )  # fmt: skip
    return MergedTensor(name, float((expected.float() - before.float()).norm()), float(error.max()))


def untie(model: nn.Module) -> bool:
    """Set config.tie_word_embeddings to False where head and embedding no longer share a table; True where that changed it."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return False
    table, head = input_table(model), output_embedding(model)
    if head is None or table is None or head.get_parameter("weight") is table.get_parameter("weight"):
        return False
    config.tie_word_embeddings = False
    return True


def input_table(model: nn.Module) -> nn.Module | None:
    """The token embedding of a transformers model, or None."""
    ask = getattr(model, "get_input_embeddings", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, nn.Module) else None


def unmerge(model: nn.Module, report: MergeReport) -> None:
    """Undo a merge: the adapter layers and their untouched bases come back.  AdapterError if the model has changed since."""
    for name, folded in report.put_in.items():
        if model.get_submodule(name) is not folded:
            raise AdapterError("only what was merged can be unmerged", code="E-ADAPT-023", place=name,
                               found=type(model.get_submodule(name)).__name__, nothing_done="Nothing was unmerged.")  # fmt: skip
    for name, wrapper in report.taken_out.items():
        replace(model, name, wrapper)
    if report.untied:
        getattr(model, "config").tie_word_embeddings = True  # noqa: B009 (a model's config is not known to nn.Module)
