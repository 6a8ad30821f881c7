"""RunConfig: the six groups of settings together, and the check that they agree.

The rules between fields stand in rules.py (two settings that exclude each other) and inert.py (a setting without effect); this class
runs them, so a RunConfig that exists is one that can be trained.
"""

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from halfbyte.config.base import Settings
from halfbyte.config.data import DataConfig
from halfbyte.config.inert import inert_problems
from halfbyte.config.lora import LoraConfig
from halfbyte.config.model import ModelConfig
from halfbyte.config.optim import OptimConfig
from halfbyte.config.problems import report
from halfbyte.config.quant import QuantConfig
from halfbyte.config.rules import run_problems
from halfbyte.config.train import TrainConfig

SHORT_FORMS = {"model": "name", "data": "path"}


class RunConfig(Settings):
    """Everything one training run is told."""

    method: Literal["qlora", "lora", "full", "auto"] = "qlora"
    """qlora: adapters on a quantized base; lora: on a 16 or 32 bit one; full: every weight; auto: lora if it fits with room, else qlora."""
    out: str = Field(default="runs/run", min_length=1)
    """Folder the run writes; it must be new, or the run's own when resuming."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The base model; `model: NAME` is short for `model: {name: NAME}`."""
    quant: QuantConfig = Field(default_factory=QuantConfig)
    """The storage of the frozen base."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """The adapter."""
    data: DataConfig
    """The rows; `data: FILE` is short for `data: {path: FILE}`."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training run."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: {SHORT_FORMS[key]: value} if key in SHORT_FORMS and isinstance(value, str) else value for key, value in values.items()}

    @model_validator(mode="after")
    def _agree(self, info: ValidationInfo) -> Self:
        report(run_problems(self) + inert_problems(self), info.context)
        return self

    @property
    def quant_format(self) -> Literal["none", "nf4", "fp4", "int8"]:
        """The storage format with `auto` resolved by the method.

        >>> RunConfig(data="rows.jsonl").quant_format, RunConfig(data="rows.jsonl", method="lora").quant_format
        ('nf4', 'none')
        """
        if self.quant.format != "auto":
            return self.quant.format
        return "nf4" if self.method in ("qlora", "auto") else "none"
