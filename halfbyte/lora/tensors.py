"""Adapter <-> flat dict of named tensors, in this program's names, and the facts a file format needs beside them.

| name | tensor |
|---|---|
| `<module>.lora_a`, `.lora_b`, `.lora_bias`, `.magnitude` | factors, bias of the update, DoRA lengths |
| `<module>.start_a`, `.start_b` | constant start that is taken off again (init pissa) |
| `<module>.weight`, `<module>.bias`, ... | what is trained of the base itself |

Loading is strict: every tensor of the model must be given, none besides, each in its shape, all finite.
Foreign names are the business of formats/peft.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.config.quant import LoftqBase
from halfbyte.errors import AdapterError
from halfbyte.lora.embedding import LoraEmbedding
from halfbyte.lora.inject import WRAPPERS, config_of, trained_parts, updates
from halfbyte.lora.layer import LoraLinear
from halfbyte.lora.targets import condensed
from halfbyte.quant.dense import is_conv1d
from halfbyte.quant.experts import expert_shapes
from halfbyte.quant.linear import QuantLinear

PARTS = ("lora_a", "lora_b", "lora_bias", "magnitude", "start_a", "start_b")

LOFTQ_NOTE = (
    "Started with LoftQ, which quantizes the base in its own way: on the base as published, or quantized by another program, "
    "this adapter gives other numbers than in training."
)


@dataclass(frozen=True)
class Collected:
    """An adapter apart from its model: what formats/peft.py writes.

    tensors     in this program's names, plain low-rank factors (a constant start is folded in: [B | -B0], [A ; A0], twice the rank)
    config      ranks and alphas per whole module name, so that the file says the same to every reader
    kinds       module -> linear, conv1d, embedding, experts
    targets     the shortest endings that mean exactly these modules
    parameters  the same for fused expert parameters
    notes       what a reader of the file must know besides
    loftq       how init loftq quantized the base; None where the adapter began otherwise
    """

    tensors: dict[str, Tensor]
    config: LoraConfig
    kinds: dict[str, str]
    targets: tuple[str, ...]
    parameters: tuple[str, ...]
    notes: tuple[str, ...] = ()
    loftq: LoftqBase | None = None


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """name -> the very parameter or buffer, in definition order."""
    found: dict[str, Tensor] = {}
    for name, update in updates(model).items():
        for part in PARTS:
            tensor = getattr(update, part, None)
            if isinstance(tensor, Tensor):
                found[f"{name}.{part}"] = tensor
    for name, module in trained_parts(model).items():
        found.update({f"{name}.{own}": parameter for own, parameter in module.trained().items()})
    return found


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU of all that training can have changed, ready to be written."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in live_tensors(model).items()}


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the values into the model's adapter.  AdapterError unless names and shapes agree exactly and all values are finite."""
    own = live_tensors(model)
    compare_names(own, tensors)
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise AdapterError(
                "each tensor must have the shape the model's adapter has", code="E-ADAPT-011", place=name,
                found=str(tuple(tensor.shape)), expected=str(tuple(own[name].shape)), nothing_done="Nothing was loaded.",
            )  # fmt: skip
        refuse_non_finite(name, tensor)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def compare_names(own: Mapping[str, object], given: Mapping[str, object], place: str = "") -> None:
    """AdapterError that counts and names what does not agree, unless the two have the same names."""
    missing = [name for name in own if name not in given]
    foreign = [name for name in given if name not in own]
    if not missing and not foreign:
        return
    both = len(own) - len(missing)
    parts = [f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
             for names, what in ((missing, "missing"), (foreign, "not in the model")) if names]  # fmt: skip
    raise AdapterError(
        "the tensors of an adapter must be those of the model's adapter", code="E-ADAPT-010", place=place,
        found=f"{both} of {len(own)} tensors match; " + "; ".join(parts), remedy="use the adapter with the base it was trained on",
        nothing_done="Nothing was loaded.",
    )  # fmt: skip


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    """AdapterError naming the tensor and counting its values that are NaN or infinite."""
    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad:
        raise AdapterError(
            "an adapter holds finite numbers only", code="E-ADAPT-012", place=name,
            found=f"{bad} of {tensor.numel()} values are NaN or infinite", remedy="use an earlier checkpoint",
            nothing_done="Nothing was loaded.",
        )  # fmt: skip


def collected(model: nn.Module) -> Collected:
    """The adapter of the model as plain factors with the facts a file needs."""
    config, layers = config_of(model), updates(model)
    tensors = adapter_tensors(model)
    folded = {name for name, layer in layers.items() if isinstance(layer, LoraLinear) and layer.start_a is not None}
    for name in folded:
        tensors[f"{name}.lora_a"] = torch.cat([tensors[f"{name}.lora_a"], tensors.pop(f"{name}.start_a")])
        tensors[f"{name}.lora_b"] = torch.cat([tensors[f"{name}.lora_b"], -tensors.pop(f"{name}.start_b")], dim=1)
    factor = 2 if folded else 1
    # The scaling must survive the doubled rank: alpha grows by the same factor, or by its root for rsLoRA.
    stretch = math.sqrt(factor) if config.rslora else factor
    ranks = {name: layer.rank * factor for name, layer in layers.items()}
    alphas = {name: layer.alpha * stretch for name, layer in layers.items()}
    rank, alpha = config.rank * factor, config.alpha * stretch
    plain = config.model_copy(update={
        "rank": rank, "alpha": alpha, "init": "default" if folded else config.init,
        "ranks": {name: own for name, own in ranks.items() if own != rank},
        "alphas": {name: own for name, own in alphas.items() if own != alpha},
    })  # fmt: skip
    kinds = {name: kind_of(layer) for name, layer in layers.items()}
    modules = [name for name, kind in kinds.items() if kind != "experts"]
    fused = [name for name, kind in kinds.items() if kind == "experts"]
    whole = tuple(name for name, part in trained_parts(model).items() if name not in layers and part.names != ("bias",))
    plain = plain.model_copy(update={"fully_trained": whole})
    notes = (LOFTQ_NOTE,) if config.init == "loftq" else ()
    targets, parameters = condensed(modules, base_names(model)), condensed(fused, fused_names(model), parts=2)
    return Collected(tensors, plain, kinds, tuple(targets), tuple(parameters), notes, loftq_base(model))


def loftq_base(model: nn.Module) -> LoftqBase | None:
    """How init loftq quantized the layers that carry the model's adapter; None where it began otherwise."""
    config = config_of(model)
    bases = [layer.frozen_base for layer in updates(model).values() if isinstance(layer, LoraLinear)]
    packed = next((base for base in bases if isinstance(base, QuantLinear)), None)
    if config.init != "loftq" or packed is None:
        return None
    return LoftqBase.model_validate({
        "format": packed.format, "blocksize": packed.blocksize, "double_quant": packed.absmax2 is not None,
        "iterations": config.loftq_iterations, "dtype": str(packed.dtype).removeprefix("torch."),
    })  # fmt: skip


def kind_of(layer: nn.Module) -> str:
    """linear, conv1d, embedding or experts: what a file format distinguishes."""
    if isinstance(layer, LoraLinear):
        return "conv1d" if is_conv1d(layer.frozen_base) else "linear"
    return "embedding" if isinstance(layer, LoraEmbedding) else "experts"


def base_names(model: nn.Module) -> list[str]:
    """Names of all modules of the model as it was before the adapter came."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, WRAPPERS)]
    inside = tuple(name + "." for name in wrapped)
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def fused_names(model: nn.Module) -> list[str]:
    """Names of all fused expert parameters of the model, adapted or not."""
    found = []
    for name, module in model.named_modules():
        owner = name.removesuffix(".base")
        found += [f"{owner}.{parameter}" for parameter in expert_shapes(module)]
    return found
