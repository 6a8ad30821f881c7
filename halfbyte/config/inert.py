"""Settings without effect, as a table: an option that does nothing is refused, not ignored.

A row says under which condition which settings do nothing.  Only settings somebody wrote down are refused (pydantic's model_fields_set);
defaults may rest.  The writer of config.yaml leaves resting settings out by the same table, so a saved file can be read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.config.problems import Problem
from halfbyte.config.rules import text_of, value_at

if TYPE_CHECKING:
    from halfbyte.config.run import RunConfig


@dataclass(frozen=True)
class Inert:
    """While `rests(run)` holds, the settings `keys` do nothing; `because` names the setting that decides."""

    keys: tuple[str, ...]
    because: str
    rests: Callable[[RunConfig], bool]
    why: str


def _no_eval(run: RunConfig) -> bool:
    return run.train.eval_every_steps is None or (run.data.eval_path is None and run.data.eval_rows == 0)


def _classifies(run: RunConfig) -> bool:
    return run.model.task == "sequence-classification"


def _embeddings_rest(run: RunConfig) -> bool:
    return run.method != "full" and run.lora.targets == "all-linear" and not run.lora.fully_trained


INERT: Sequence[Inert] = (
    Inert(("lora.*", "optim.lora_plus_ratio"), "method", lambda run: run.method == "full", "method full has no adapter"),
    Inert(("quant.blocksize", "quant.double_quant", "quant.skip", "quant.quantize_head"), "method",
          lambda run: run.quant_format == "none", "the base is not quantized"),
    Inert(("quant.blocksize", "quant.double_quant"), "quant.format", lambda run: run.quant_format == "int8",
          "int8 has one scale for each row of a weight"),
    Inert(("quant.quantize_head",), "model.task", lambda run: run.quant.quantize_head and _classifies(run),
          "the head of a classifier is trained, so it stays as it is"),
    Inert(("quant.calibration_rows",), "quant.calibrate", lambda run: run.quant.calibrate is False, "nothing is calibrated"),
    Inert(("lora.loftq_iterations",), "lora.init", lambda run: run.lora.init != "loftq", "only init loftq runs in rounds"),
    Inert(("optim.final_lr_share",), "optim.schedule", lambda run: run.optim.schedule == "constant",
          "a constant learning rate does not fall"),
    Inert(("optim.warmup_share",), "optim.warmup_steps", lambda run: run.optim.warmup_steps is not None, "the warm-up is given in steps"),
    Inert(("train.epochs",), "train.max_steps", lambda run: run.train.max_steps is not None, "the length is given in steps"),
    Inert(("optim.embedding_lr",), "lora.fully_trained", _embeddings_rest, "no embedding is trained"),
    Inert(("model.labels",), "model.task", lambda run: not _classifies(run), "only a classifier has labels"),
    Inert(("model.template", "data.train_on", "train.sample_prompts"), "model.task", _classifies, "a classifier reads plain text"),
    Inert(("model.template",), "data.shape", lambda run: run.data.shape in ("text", "tokens"), "these rows are not conversations"),
    Inert(("data.train_on",), "data.shape", lambda run: run.data.shape in ("text", "tokens"), "these rows have no turns"),
    Inert(("data.text_field",), "data.shape", lambda run: run.data.shape not in ("auto", "text", "classification"),
          "rows of this shape have their own columns"),
    Inert(("data.label_field",), "data.shape", lambda run: run.data.shape not in ("auto", "classification"),
          "rows of this shape have no label"),
    Inert(("data.eval_rows",), "data.eval_path", lambda run: run.data.eval_path is not None, "the held-out rows have a file of their own"),
    Inert(("train.keep_best",), "train.eval_every_steps", _no_eval, "nothing is evaluated, so no step is the best"),
    Inert(("train.keep_checkpoints", "train.verify_checkpoints"), "train.save_every_steps",
          lambda run: run.train.save_every_steps is None, "no checkpoints are saved"),
)  # fmt: skip


INERT_CODE = "E-CONF-170"

EITHER_OR = (("train.max_steps", "train.epochs"), ("optim.warmup_steps", "optim.warmup_share"), ("data.eval_path", "data.eval_rows"))
"""Two ways to say one thing.  In one place only one of them is taken; the command line's drops the other one of the file."""


def resting_keys(run: RunConfig) -> dict[str, Inert]:
    """Every setting that does nothing in this run, with its reason."""
    resting: dict[str, Inert] = {}
    for row in INERT:
        if row.rests(run):
            for key in row.keys:
                group = key.removesuffix(".*")
                names = [f"{group}.{name}" for name in type(value_at(run, group)).model_fields] if key.endswith(".*") else [key]
                resting.update({name: row for name in names if name not in resting})
    return resting


def _written(run: RunConfig, key: str) -> bool:
    group, _, name = key.rpartition(".")
    return name in value_at(run, group).model_fields_set


def inert_problems(run: RunConfig) -> list[Problem]:
    """One problem for each setting that was written down and does nothing; `null` and `false` that say "off" are no setting."""
    return [
        Problem(
            INERT_CODE, "this setting has no effect here", (key, row.because),
            found=f"{key}={text_of(value_at(run, key))} with {row.because}={text_of(value_at(run, row.because))}: {row.why}",
            remedy=f"leave {key} out, or change {row.because}",
        )
        for key, row in resting_keys(run).items()
        if _written(run, key) and value_at(run, key) is not None
    ]  # fmt: skip
