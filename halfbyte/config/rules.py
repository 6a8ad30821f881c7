"""Settings that exclude each other, as a table: one row, one rule, one code.

Each row says which settings are involved, when they clash, and what to change.  Settings that are merely without effect are in inert.py.
Limits that depend on the model (max_tokens over its limit) or the machine are checked where those are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.config.base import ALPHA_LIMIT, RANK_LIMIT
from halfbyte.config.problems import Problem

if TYPE_CHECKING:
    from halfbyte.config.lora import LoraConfig
    from halfbyte.config.run import RunConfig


@dataclass(frozen=True)
class Clash:
    """`broken(config)` is true when the settings `keys` cannot stand together."""

    code: str
    rule: str
    keys: tuple[str, ...]
    broken: Callable[[Any], bool]
    remedy: str


LORA_CLASHES: Sequence[Clash] = (
    Clash("E-CONF-130", "a DoRA update has no bias of its own", ("lora.dora", "lora.lora_bias"),
          lambda lora: lora.dora and lora.lora_bias, "set lora.lora_bias=false or lora.dora=false"),
    Clash("E-CONF-131", "an update with a bias begins with init default", ("lora.lora_bias", "lora.init"),
          lambda lora: lora.lora_bias and lora.init != "default", "set lora.init=default or lora.lora_bias=false"),
    Clash("E-CONF-132", "a layer number stands twice in the list", ("lora.layers",),
          lambda lora: len(set(lora.layers)) != len(lora.layers), "name each layer once"),
    Clash("E-CONF-133", "the list of targets is empty", ("lora.targets",),
          lambda lora: not lora.targets, "name at least one layer, or take lora.targets=all-linear"),
    Clash("E-CONF-134", f"init pissa is saved with its start taken off, at twice the rank, and an adapter's rank is at most {RANK_LIMIT}",
          ("lora.init", "lora.rank", "lora.ranks"),
          lambda lora: lora.init == "pissa" and 2 * max([lora.rank, *lora.ranks.values()]) > RANK_LIMIT,
          f"set lora.init=default, or a rank of at most {RANK_LIMIT // 2}"),
    Clash("E-CONF-135", f"init pissa is saved at twice the rank and the same scaling, and an adapter's alpha is at most {ALPHA_LIMIT:,.0f}",
          ("lora.init", "lora.alpha", "lora.alphas"),
          lambda lora: lora.init == "pissa" and 2 * max([lora.alpha, *lora.alphas.values()]) > ALPHA_LIMIT,
          f"set lora.init=default, or an alpha of at most {ALPHA_LIMIT / 2:,.0f}"),
)  # fmt: skip

RUN_CLASHES: Sequence[Clash] = (
    Clash("E-CONF-140", "method qlora needs a quantized base", ("method", "quant.format"),
          lambda run: run.method == "qlora" and run.quant.format == "none", "set method=lora, or quant.format=nf4"),
    Clash("E-CONF-141", "method lora keeps its base in 16 or 32 bits", ("method", "quant.format"),
          lambda run: run.method == "lora" and run.quant.format not in ("none", "auto"), "set method=qlora, or leave quant.format out"),
    Clash("E-CONF-142", "a quantized weight cannot be trained itself", ("method", "quant.format"),
          lambda run: run.method == "full" and run.quant.format not in ("none", "auto"), "set method=qlora, or leave quant.format out"),
    Clash("E-CONF-143", "init loftq starts from the quantization error, and this base has none", ("lora.init", "method"),
          lambda run: run.lora.init == "loftq" and run.method == "lora", "set method=qlora, or lora.init=pissa"),
    Clash("E-CONF-144", "init loftq is made for 4-bit bases", ("lora.init", "quant.format"),
          lambda run: run.lora.init == "loftq" and run.method == "qlora" and run.quant.format == "int8",
          "set quant.format=nf4, or lora.init=default"),
    Clash("E-CONF-146", "method auto decides itself whether the base is quantized", ("method", "quant.format"),
          lambda run: run.method == "auto" and run.quant.format != "auto", "set method=qlora or lora, or leave quant.format out"),
    Clash("E-CONF-147", "this start of the adapter is made for a quantized base, and method auto may choose another",
          ("method", "lora.init"), lambda run: run.method == "auto" and run.lora.init in ("loftq", "calibrated"), "set method=qlora"),
    Clash("E-CONF-145", "the output head is both quantized and left out", ("quant.quantize_head", "quant.skip"),
          lambda run: run.quant.quantize_head and "lm_head" in run.quant.skip, "take lm_head out of quant.skip"),
    Clash("E-CONF-148", "calibration makes the quantized base of method qlora", ("quant.calibrate", "method"),
          lambda run: run.quant.calibrate is True and run.method != "qlora", "set method=qlora, or quant.calibrate=false"),
    Clash("E-CONF-149", "calibration is made for 4-bit bases", ("quant.calibrate", "quant.format"),
          lambda run: run.quant.calibrate is not False and run.quant.format == "int8",
          "set quant.format=nf4, or quant.calibrate=false"),
    Clash("E-CONF-156", "init loftq quantizes the base itself, so it cannot be calibrated as well", ("quant.calibrate", "lora.init"),
          lambda run: run.quant.calibrate is not False and run.lora.init == "loftq", "set lora.init=calibrated, or quant.calibrate=false"),
    Clash("E-CONF-157", "init calibrated begins on the error of a quantized base", ("lora.init", "method"),
          lambda run: run.lora.init == "calibrated" and run.method == "lora", "set method=qlora, or lora.init=default"),
    Clash("E-CONF-150", "packing is for text; a classifier reads one sample a row", ("data.packing", "model.task"),
          lambda run: run.data.packing and run.model.task == "sequence-classification", "set data.packing=false"),
    Clash("E-CONF-151", "a classifier needs rows with a text and a label", ("model.task", "data.shape"),
          lambda run: run.model.task == "sequence-classification" and run.data.shape not in ("auto", "classification"),
          "set data.shape=classification, or model.task=causal-lm"),
    Clash("E-CONF-152", "rows with a label train a classifier", ("data.shape", "model.task"),
          lambda run: run.data.shape == "classification" and run.model.task == "causal-lm", "set model.task=sequence-classification"),
    Clash("E-CONF-153", "held-out rows must not be the training rows", ("data.eval_path", "data.path"),
          lambda run: run.data.eval_path == run.data.path, "name another file, or leave data.eval_path out to hold some rows out"),
    Clash("E-CONF-154", "a label stands twice in the list", ("model.labels",),
          lambda run: len(set(run.model.labels)) != len(run.model.labels), "name each label once"),
    Clash("E-CONF-155", "one label leaves nothing to choose", ("model.labels",),
          lambda run: len(run.model.labels) == 1, "name at least two labels, or leave model.labels out to take them from the data"),
    Clash("E-CONF-161", "the warm-up is longer than the training", ("optim.warmup_steps", "train.max_steps"),
          lambda run: None not in (run.optim.warmup_steps, run.train.max_steps) and run.optim.warmup_steps >= run.train.max_steps,
          "set fewer optim.warmup_steps"),
    Clash("E-CONF-163", "an optimizer step is a whole number of micro-batches", ("train.global_batch_size", "train.micro_batch_size"),
          lambda run: run.train.micro_batch_size != "auto" and run.train.global_batch_size % run.train.micro_batch_size != 0,
          "make train.global_batch_size a multiple of train.micro_batch_size"),
    Clash("E-CONF-164", "early stopping watches the held-out loss, and nothing is evaluated",
          ("train.early_stop_patience", "train.eval_every_steps"),
          lambda run: run.train.early_stop_patience is not None and run.train.eval_every_steps is None,
          "set train.eval_every_steps, or leave train.early_stop_patience out"),
    Clash("E-CONF-165", "early stopping watches the held-out loss, and no rows are held out",
          ("train.early_stop_patience", "data.eval_rows"),
          lambda run: run.train.early_stop_patience is not None and run.data.eval_path is None and run.data.eval_rows == 0,
          "set data.eval_rows or data.eval_path, or leave train.early_stop_patience out"),
    Clash("E-CONF-166", "on_nan=rollback returns to a checkpoint, and none are saved", ("train.on_nan", "train.save_every_steps"),
          lambda run: run.train.on_nan == "rollback" and run.train.save_every_steps is None,
          "set train.save_every_steps, or train.on_nan=stop"),
    Clash("E-CONF-167", "a tracker stands twice in the list", ("train.trackers",),
          lambda run: len(set(run.train.trackers)) != len(run.train.trackers), "name each tracker once"),
)  # fmt: skip


def value_at(config: Any, key: str) -> Any:
    """The value at a dotted key, e.g. value_at(run, "lora.rank")."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _problem(clash: Clash, values: dict[str, Any]) -> Problem:
    found = ", ".join(f"{key}={text_of(value)}" for key, value in values.items())
    return Problem(clash.code, clash.rule, clash.keys, found=found, remedy=clash.remedy)


def text_of(value: Any) -> str:
    """A value as a settings file spells it.

    >>> text_of(True), text_of(None), text_of(("a", "b")), text_of(1e-4)
    ('true', 'null', '[a, b]', '0.0001')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(text_of(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {text_of(part)}" for key, part in value.items()) + "}"
    return str(value)


def lora_problems(lora: LoraConfig) -> list[Problem]:
    """What does not agree inside the adapter's own settings."""
    broken = (clash for clash in LORA_CLASHES if clash.broken(lora))
    return [_problem(clash, {key: getattr(lora, key.removeprefix("lora.")) for key in clash.keys}) for clash in broken]


def run_problems(run: RunConfig) -> list[Problem]:
    """What does not agree between the groups of settings."""
    broken = (clash for clash in RUN_CLASHES if clash.broken(run))
    return [_problem(clash, {key: value_at(run, key) for key in clash.keys}) for clash in broken]
