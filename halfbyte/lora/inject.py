"""Put adapters in, take them out, freeze the rest.

    inject(model, LoraConfig(rank=16)) -> what was put where, and how many parameters train
    eject(model)                       -> the model as it was loaded, to the bit

All state lives in the tree itself (each adapter layer knows its config), so a deep copy or a saved state dict stays whole.
Does not read or write files (formats/peft.py) and does not choose names (targets.py).
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import AdapterError, TargetError
from halfbyte.lora.embedding import LoraEmbedding
from halfbyte.lora.experts import ExpertUpdate, LoraExperts
from halfbyte.lora.init import INITS, AdapterLayer, Start
from halfbyte.lora.layer import DTYPES, LoraLinear
from halfbyte.lora.targets import alpha_of, candidates, completed, fully_trained, rank_of, resolve
from halfbyte.lora.trained import TrainedParts
from halfbyte.quant.dense import shape_of
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import freeze, modules_of, replace, trainable, undone_on_error

WRAPPERS = (LoraLinear, LoraEmbedding, LoraExperts, TrainedParts)


@dataclass(frozen=True)
class Injected:
    """names: what carries an adapter, in definition order; ranks: theirs; counts of trained and of all parameters."""

    names: tuple[str, ...]
    ranks: dict[str, int]
    trainable_params: int
    total_params: int

    @property
    def share(self) -> float:
        """Trained parameters / all parameters."""
        return self.trainable_params / self.total_params


def frozen_base(wrapper: nn.Module) -> nn.Module:
    """The module that stood here before an adapter came."""
    if isinstance(wrapper, TrainedParts):
        return wrapper.base
    assert isinstance(wrapper, (LoraLinear, LoraEmbedding, LoraExperts))
    return wrapper.frozen_base


def updates(model: nn.Module) -> dict[str, AdapterLayer]:
    """name -> the module holding lora_a and lora_b, in definition order; "<module>.<parameter>" for fused experts."""
    found: dict[str, AdapterLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            found[name] = module
        elif isinstance(module, LoraExperts):
            found.update({f"{name}.{own}": update for own, update in module.named_updates().items()})
    return found


def trained_parts(model: nn.Module) -> dict[str, TrainedParts]:
    """name -> modules of the base with trained parameters of their own, in definition order."""
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    return {
        name.removesuffix(".base") if name.removesuffix(".base") in layers else name: module
        for name, module in model.named_modules() if isinstance(module, TrainedParts)
    }  # fmt: skip


def config_of(model: nn.Module) -> LoraConfig:
    """The config that the model's adapter was made with; AdapterError where there is none."""
    for update in updates(model).values():
        return update.config
    raise AdapterError("the model must carry an adapter", code="E-ADAPT-003", found=type(model).__name__, remedy="inject one first")


def total_parameters(model: nn.Module) -> int:
    """Parameters of the model, packed weights counted as what they stand for, adapters included; shared ones once."""
    shapes: list[tuple[int, ...]] = [shape_of(module) for module in model.modules() if isinstance(module, QuantLinear)]
    shapes += [shape for module in model.modules() if isinstance(module, QuantExperts) for shape in module.shapes.values()]
    packed = sum(math.prod(shape) for shape in shapes)
    return packed + sum(parameter.numel() for parameter in model.parameters())


def inject(
    model: nn.Module, config: LoraConfig, *, seed: int = 0, quant: QuantConfig | None = None, start: bool = True,
    begun: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Injected:  # fmt: skip
    """Wrap the targets, freeze the rest, return what was done.  `quant` says how init loftq quantizes (default: nf4).

    `begun` holds (A, B) by module name for init calibrated.

    With start=False the factors are zero and the base is as it was, whatever `init` says: for values that come from a file.

    The same seed gives the same start on every machine.  Raises TargetError (nothing to adapt), AdapterError (already adapted), and what
    the start raises; the model is then as it was.
    """
    if updates(model) or trained_parts(model):
        raise AdapterError(
            "a model carries one adapter at a time", code="E-ADAPT-004", found=f"{len(updates(model))} adapted layers",
            remedy="save the adapter if you need it, then take it out: hb.eject(model)", nothing_done="Nothing was injected.",
        )  # fmt: skip
    config = completed(model, config)
    names, whole, kinds = resolve(model, config), fully_trained(model, config), candidates(model)
    total = total_parameters(model)
    recipe = quant if quant is not None else QuantConfig(format="nf4")
    recipe = recipe.model_copy(update={"format": "nf4"}) if recipe.format == "auto" else recipe
    generator = torch.Generator().manual_seed(seed)
    with undone_on_error(model):
        freeze(model)
        _train_parts(model, config, names, whole)
        for name, update in _wrap(model, config, names, kinds).items():
            if start:
                INITS[config.init](update, Start(name, generator, recipe, config.loftq_iterations, begun))
            if not isinstance(update, ExpertUpdate):
                update.start_magnitude()
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    return Injected(tuple(names), {name: rank_of(config, name) for name in names}, trained, total + trained)


def _train_parts(model: nn.Module, config: LoraConfig, names: list[str], whole: list[str]) -> None:
    """Give trained copies to the modules trained whole and to the biases the config asks for."""
    dtype = DTYPES[config.dtype]
    for name in whole:
        module = model.get_submodule(name)
        if any(isinstance(part, QuantLinear) for part in module.modules()):
            raise TargetError(
                "a module that is trained whole must not be quantized", code="E-TARGET-004", place="lora.fully_trained", found=name,
                expected="a dense module", remedy=f"add {name} to quant.skip", nothing_done="Nothing was trained.",
            )  # fmt: skip
        replace(model, name, TrainedParts(module, tuple(dict(module.named_parameters())), dtype))
    if config.train_bias == "none":
        return
    under = tuple(name + "." for name in whole)
    for name, module in modules_of(model, lambda _, module: "bias" in dict(module.named_parameters(recurse=False))):
        adapted = name in names
        if name and not name.startswith(under) and name not in whole and (adapted or config.train_bias == "all"):
            replace(model, name, TrainedParts(module, ("bias",), dtype))


def _wrap(model: nn.Module, config: LoraConfig, names: list[str], kinds: dict[str, str]) -> dict[str, AdapterLayer]:
    """Put an adapter layer at every name; name -> the module with its factors."""
    fused: dict[str, list[str]] = defaultdict(list)
    for name in names:
        rank, alpha = rank_of(config, name), alpha_of(config, name)
        if kinds[name] == "experts":
            fused[name.rpartition(".")[0]].append(name)
        elif kinds[name] == "embedding":
            base = model.get_submodule(name)
            assert isinstance(base, nn.Embedding)
            replace(model, name, LoraEmbedding(base, config, rank=rank, alpha=alpha))
        else:
            replace(model, name, LoraLinear(model.get_submodule(name), config, rank=rank, alpha=alpha))
    for module_name, owned in fused.items():
        base = model.get_submodule(module_name)
        own = {name.rpartition(".")[2]: (rank_of(config, name), alpha_of(config, name)) for name in owned}
        replace(model, module_name, LoraExperts(base, config, own, name=module_name))
    found = updates(model)
    return {name: found[name] for name in names}


def eject(model: nn.Module) -> int:
    """Put every base back where its wrapper was; return how many.  The model is then as it was loaded, all of it frozen.

    After init loftq the base is the quantized one, because that is what the adapter was started on.
    """
    wrappers = list(modules_of(model, lambda _, module: isinstance(module, WRAPPERS)))
    outer = [(name, module) for name, module in wrappers if not any(name.startswith(other + ".") for other, _ in wrappers)]
    for name, module in outer:
        replace(model, name, frozen_base(module))
    return len(outer)
