"""What a run is, so that a checkpoint of another run is refused: digests of its inputs and every setting that changes its numbers.

    identity = {"base": ..., "tokenizer": ..., "template": ..., "data": ..., "config": {"lora.rank": 16, ...}}

A resume may change what does not touch the numbers of the steps already done: how long to train, what to log, when to evaluate and
save, how much to keep.  Everything else must be as it was.  The program's version is recorded beside the identity and not compared.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Protocol

from halfbyte.errors import CheckpointError
from halfbyte.redact import secrets

FREE_TO_CHANGE = frozenset({
    "out", "model.name", "model.revision", "model.allow_download", "model.template", "data.path", "data.eval_path", "data.workers",
    "train.epochs", "train.max_steps", "train.log_every_steps", "train.eval_every_steps", "train.save_every_steps",
    "train.keep_checkpoints", "train.keep_best", "train.early_stop_patience", "train.trackers", "train.sample_prompts",
    "train.verify_checkpoints", "train.threads", "train.on_nan",
})
"""Settings that may differ on resume.  Names and paths are here since the digests of what they lead to are compared instead."""


DIGESTS = ("base", "tokenizer", "template", "data")


class Dumpable(Protocol):
    """A pydantic model."""

    def model_dump(self, *, mode: str) -> dict[str, object]: ...


def identity_of(config: Dumpable, *, base: str, tokenizer: str, template: str, data: str) -> dict[str, object]:
    """The identity of a run: its resolved config, flattened, and digests (any text that changes when the thing changes).

    base       digest of the base model's files
    tokenizer, template   see `text_digest`
    data                  digest of the rows, also of those held out
    """
    return {
        "base": base, "tokenizer": tokenizer, "template": template, "data": data,
        "config": without_secrets(flatten(config.model_dump(mode="json"))),
    }


def without_secrets(settings: Mapping[str, object]) -> dict[str, object]:
    """Flat settings with whatever looks like a secret in a text blanked: what may be written and shown."""
    return {key: secrets(value) if isinstance(value, str) else value for key, value in settings.items()}


def text_digest(text: str | None) -> str:
    """sha256 of a text as hex, e.g. of `tokenizer.backend_tokenizer.to_str()` or of a template; "" for None."""
    return "" if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """
    >>> flatten({"lora": {"rank": 16, "ranks": {}}, "out": "runs/a"})
    {'lora.rank': 16, 'lora.ranks': {}, 'out': 'runs/a'}
    """
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:
            flat |= flatten(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(saved: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    """One line `field: saved -> here` for each difference that a resume may not have; empty when the run is the same."""
    lines = [f"{name}: {_short(saved.get(name))} -> {_short(here.get(name))}" for name in DIGESTS if saved.get(name) != here.get(name)]
    before, now = _config(saved), _config(here)
    for name in sorted(set(before) | set(now)):
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name):
            lines.append(f"{name}: {json.dumps(before.get(name))} -> {json.dumps(now.get(name))}")
    return lines


def require_same(saved: Mapping[str, object], here: Mapping[str, object], place: str) -> None:
    """Raise CheckpointError naming each field with both values unless `differences` is empty."""
    lines = differences(saved, here)
    if lines:
        raise CheckpointError(
            "a run goes on only with the model, data and settings it began with", code="E-CKPT-002", place=place,
            found="\n".join(["field: in the checkpoint -> now", *lines]),
            expected="on resume only length, logging, evaluation and saving may change",
            remedy="put these back as they were, or start a new run with another --out", nothing_done="Nothing was trained.",
        )


def _config(identity: Mapping[str, object]) -> Mapping[str, object]:
    config = identity.get("config", {})
    return config if isinstance(config, Mapping) else {}


def _short(value: object) -> str:
    text = str(value) if value else "none"
    return text if len(text) <= 16 else text[:16] + ".."
