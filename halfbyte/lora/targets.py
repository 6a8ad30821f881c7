"""Which modules carry an adapter: names and patterns -> modules.  A target that matches nothing raises, with the nearest names.

`all-linear` means every linear layer and all fused experts, but not the head, routers, or what is trained whole; how any other pattern
meets a name stands in config/patterns.py.
"""

from collections.abc import Iterable

from torch import nn

from halfbyte.config.lora import LoraConfig
from halfbyte.config.patterns import ALL_LINEAR, first_match, in_layers, matches
from halfbyte.errors import TargetError, nearest
from halfbyte.quant.dense import is_linear_like
from halfbyte.quant.experts import expert_shapes

CLASSIFIER_HEADS = ("score", "classifier")


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank of this module's adapter."""
    found = first_match(config.ranks, name)
    return config.rank if found is None else config.ranks[found]


def alpha_of(config: LoraConfig, name: str) -> float:
    """The alpha of this module's adapter."""
    found = first_match(config.alphas, name)
    return config.alpha if found is None else config.alphas[found]


def candidates(model: nn.Module) -> dict[str, str]:
    """name -> kind (linear, embedding, experts) of all that can carry an adapter, in definition order."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_linear_like(module):
            found[name] = "linear"
        elif isinstance(module, nn.Embedding):
            found[name] = "embedding"
        else:
            found.update({f"{name}.{own}": "experts" for own in expert_shapes(module)})
    found.pop("", None)
    return found


def name_of(model: nn.Module, wanted: object) -> str | None:
    """The name of a module object in the model, or None."""
    return next((name for name, module in model.named_modules() if module is wanted), None)


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits over the vocabulary, as a transformers model names it, or None."""
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, nn.Module) else None


def output_head(model: nn.Module) -> str | None:
    """Name of what turns hidden states into answers: the output embedding, or a classifier's last layer, or None."""
    head = output_embedding(model)
    return classifier_head(model) if head is None else name_of(model, head)


def classifier_head(model: nn.Module) -> str | None:
    """Name of the fresh head of a classifier (`score` or `classifier`) where the model has no output embedding."""
    if output_embedding(model) is not None:
        return None
    return next((name for name, _ in model.named_children() if name in CLASSIFIER_HEADS), None)


def completed(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with what the model adds: the fresh head of a classifier is trained whole, as PEFT does for SEQ_CLS."""
    head = classifier_head(model)
    if head is None or any(matches(pattern, head) for pattern in config.fully_trained):
        return config
    return config.model_copy(update={"fully_trained": (*config.fully_trained, head)})


def fully_trained(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules that are trained whole, in definition order; TargetError where a pattern finds none."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in config.fully_trained:
        if not any(matches(pattern, name) for name in names):
            raise no_match("lora.fully_trained", pattern, names)
    chosen = [name for name in names if any(matches(pattern, name) for pattern in config.fully_trained)]
    return [name for name in chosen if not any(name.startswith(other + ".") for other in chosen)]


def resolve(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of all that gets an adapter, in definition order.

    Raises TargetError for a pattern that matches nothing, or only what cannot carry an adapter, or when nothing is left.
    """
    kinds = candidates(model)
    everything = [name for name, _ in model.named_modules() if name]
    whole = fully_trained(model, config)
    head = output_head(model)
    patterns = (config.targets,) if isinstance(config.targets, str) else config.targets
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            found = [name for name, kind in kinds.items() if kind in ("linear", "experts") and name != head]
        else:
            found = [name for name in kinds if matches(pattern, name)]
            if not found:
                raise no_match("lora.targets", pattern, list(kinds), [name for name in everything if matches(pattern, name)])
        chosen.update(found)
    for pattern in config.exclude:
        if not any(matches(pattern, name) for name in (*kinds, *everything)):
            raise no_match("lora.exclude", pattern, list(kinds))
    kept = [
        name for name in kinds
        if name in chosen and in_layers(name, config.layers) and not any(matches(pattern, name) for pattern in config.exclude)
        and not any(name == other or name.startswith(other + ".") for other in whole)
    ]  # fmt: skip
    if not kept:
        raise TargetError(
            "at least one module must carry an adapter", code="E-TARGET-003", place="lora.targets", found=f"none of {len(chosen)} left",
            expected="targets that exclude, layers and fully_trained do not take away", nothing_done="Nothing was trained.",
        )  # fmt: skip
    return kept


def no_match(place: str, pattern: str, names: list[str], unfit: list[str] | None = None) -> TargetError:
    """The error for a pattern without a module, with the nearest names."""
    if unfit:
        return TargetError(
            "an adapter needs a linear layer, an embedding or fused experts", code="E-TARGET-002", place=place,
            found=f"{pattern} names {unfit[0]}, which is none of them", expected=", ".join(endings(names)[:12]),
            nothing_done="Nothing was trained.",
        )  # fmt: skip
    return TargetError(
        "every pattern must match a module of the model", code="E-TARGET-001", place=place, found=pattern,
        expected=", ".join(endings(names)[:12]), remedy=nearest(pattern, [*endings(names), *names]), nothing_done="Nothing was trained.",
    )  # fmt: skip


def endings(names: Iterable[str]) -> list[str]:
    """The different last parts of the names, in first-seen order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()))


def condensed(chosen: list[str], names: Iterable[str], parts: int = 1) -> list[str]:
    """The shortest list of name endings that means exactly `chosen` among `names`: their last parts where that holds, else whole names."""
    wanted, short = set(chosen), sorted({".".join(name.split(".")[-parts:]) for name in chosen})
    meant = {name for name in names if any(matches(ending, name) for ending in short)}
    return short if meant == wanted else sorted(chosen)
