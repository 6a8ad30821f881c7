"""The low-rank update: which layers carry one, how large it is, and how it begins."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from halfbyte.config.base import Alpha, Rank, Settings, Switch
from halfbyte.config.problems import report
from halfbyte.config.rules import lora_problems


class LoraConfig(Settings):
    """The adapter: delta_weight = scaling * lora_b @ lora_a."""

    rank: Rank = 16
    """Inner size of the update."""
    alpha: Alpha = 32
    """Numerator of the scaling alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's input that is zeroed while training."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the head), a regular expression on whole module names, or a list of name endings."""
    exclude: tuple[str, ...] = ()
    """Name endings or patterns that are taken out of the targets again."""
    rslora: Switch = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank, so that large ranks learn as fast as small ones."""
    dora: Switch = False
    """Learn the length of each weight row beside its direction (DoRA)."""
    init: Literal["default", "gaussian", "pissa", "loftq", "calibrated"] = "default"
    """How the factors begin: Kaiming and zero, Gaussian and zero, largest directions of the base, its quantization error, its own start."""
    loftq_iterations: Annotated[int, Field(ge=1, le=100)] = 1
    """Rounds of quantizing and factoring the rest, for init loftq."""
    ranks: dict[str, Rank] = Field(default_factory=dict)
    """Pattern of module names -> rank, where it differs from `rank`."""
    alphas: dict[str, Alpha] = Field(default_factory=dict)
    """Pattern of module names -> alpha, where it differs from `alpha`."""
    lora_bias: Switch = False
    """Give the update a bias of its own."""
    train_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained: none, all, or those of the adapted layers."""
    fully_trained: tuple[str, ...] = ()
    """Names of modules that are trained whole and saved with the adapter, e.g. embed_tokens or lm_head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the factors are kept and trained in."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Numbers of the layers that carry an adapter, from 0; empty means all."""

    @model_validator(mode="after")
    def _agree(self, info: ValidationInfo) -> Self:
        report(lora_problems(self), info.context)
        return self


