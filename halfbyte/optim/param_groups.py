"""Which trainable parameter learns at which rate and decays or not, as groups that can be printed by name.

| group             | parameters                                              | rate                   | decays |
|-------------------|---------------------------------------------------------|------------------------|--------|
| matrices          | the rest                                                | lr                     | yes    |
| lora_b            | `lora_b` factors                                        | lora_plus_ratio * lr   | yes    |
| vectors           | everything with one dimension: biases, norms, DoRA      | lora_plus_ratio * lr   | no     |
| embeddings        | tables of tokens, and the factors of adapters on them   | embedding_lr, else lr  | yes    |
| embedding_vectors | the DoRA lengths of adapters on tables                  | embedding_lr, else lr  | no     |

LoRA+ (https://arxiv.org/abs/2402.12354) gives B a higher rate than A; without it all rates are `lr`.  Decay touches no vector: pulling
norms and magnitudes to zero is not what weight decay is for.  An option that would change nothing is refused.
"""

from typing import Any

from torch import nn

from halfbyte.config.optim import OptimConfig
from halfbyte.errors import ConfigError
from halfbyte.surgery import trainable

ORDER = ("matrices", "lora_b", "vectors", "embeddings", "embedding_vectors")
NO_DECAY = ("vectors", "embedding_vectors")


def label_of(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """The group a trainable parameter belongs to."""
    *path, last = name.split(".")
    owners = [model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path) + 1)]
    # a table, or what stands around one: an adapter, or the trained copy of its values, which lies a level deeper
    if any(isinstance(getattr(owner, "base", owner), nn.Embedding) for owner in owners):
        return "embedding_vectors" if parameter.ndim <= 1 else "embeddings"
    if last == "lora_b":
        return "lora_b"
    return "vectors" if parameter.ndim <= 1 else "matrices"


def groups(model: nn.Module, config: OptimConfig, lr: float) -> list[dict[str, Any]]:
    """Parameter groups for `AdamW`: dicts of label, params (name, parameter), lr, base_lr, weight_decay; empty groups are left out.

    Raises ConfigError when `lora_plus_ratio` or `embedding_lr` is set and no parameter would feel it.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {label: [] for label in ORDER}
    for name, parameter in trainable(model):
        members[label_of(model, name, parameter)].append((name, parameter))
    for option, wanted, default, label in (
        ("lora_plus_ratio", config.lora_plus_ratio, 1.0, "lora_b"),
        ("embedding_lr", config.embedding_lr, None, "embeddings"),
    ):
        if wanted != default and not members[label]:
            raise ConfigError(
                "an option must change something", code="E-CONF-302", place=f"optim.{option}", found=str(wanted),
                expected=f"trainable parameters in the group {label!r}; this run has none", remedy=f"remove optim.{option}",
                nothing_done="Nothing was trained.",
            )
    ratio = config.lora_plus_ratio
    rates = {"matrices": lr, "lora_b": lr * ratio, "vectors": lr * ratio, "embeddings": config.embedding_lr or lr}
    rates["embedding_vectors"] = rates["embeddings"]
    return [
        {
            "label": label, "params": members[label], "lr": rates[label], "base_lr": rates[label],
            "weight_decay": 0.0 if label in NO_DECAY else config.weight_decay,
        }
        for label in ORDER if members[label]
    ]


def describe(param_groups: list[dict[str, Any]]) -> str:
    """One line per group: label, tensors, parameters, rate, decay."""
    lines = []
    for group in param_groups:
        parameters = [item[1] if isinstance(item, tuple) else item for item in group["params"]]
        count = sum(parameter.numel() for parameter in parameters)
        lines.append(
            f"{group['label']}: {len(parameters)} tensors, {count:,} parameters, learning rate {group['base_lr']:g}, "
            f"weight decay {group['weight_decay']:g}"
        )
    return "\n".join(lines)


def set_rate(param_groups: list[dict[str, Any]], share: float) -> None:
    """Set every group's rate to `share` of its full rate."""
    for group in param_groups:
        group["lr"] = group["base_lr"] * share
