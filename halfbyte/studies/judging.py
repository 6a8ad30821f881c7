"""What is judged after the runs of a study: checked before any of them, for what fails at the end costs all of them.

    judged/<setting>/seed-<n>.order.json   what was asked: general text (its sha256), score, samples
    judged/<setting>/seed-<n>.json         the answer, thrown away before another order is written

What is asked belongs to each judgement, not to the study: other general text or another score judges the same runs again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config import RunConfig
from halfbyte.data.load import load_data, require_task
from halfbyte.errors import ConfigError, DataError
from halfbyte.evaluate.rows import judged_config
from halfbyte.models.load import load_tokenizer, token_limit
from halfbyte.models.source import resolve
from halfbyte.studies.identity import digests_of
from halfbyte.studies.runs import Folder, call, failure, read_json, write_json

COMPARED = ("before", "general_sha256", "score", "samples")


@dataclass(frozen=True)
class Asked:
    """What is judged of every run: general text, the task score (metric, rows, max_new_tokens), and answers to show of the first seed."""

    general: Path | None
    score: dict[str, Any] | None
    samples: int


class Reader:
    """Rows as the model of a study sees them, before it is loaded."""

    def __init__(self, config: RunConfig) -> None:
        source = resolve(config.model.name, revision=config.model.revision, allow_download=config.model.allow_download)
        self.tokenizer, self.limit = load_tokenizer(source), token_limit(source)

    def fits(self, text: str) -> bool:
        """Whether plain text, its begin and end token with it, is within the model's limit."""
        return self.limit is None or len(self.tokenizer(text, verbose=False).input_ids) + 2 <= self.limit

    def require_judgeable(self, asked: Asked, held_out: Path, config: RunConfig) -> None:
        """Raise DataError for general text without one that can be judged, and for rows without prompts where a score is asked for."""
        if config.model.task == "sequence-classification":
            return
        if asked.general is not None:
            general = judged_config(asked.general, self.limit, train_on=config.data.train_on)
            read = load_data(general, self.tokenizer, model_limit=self.limit, template=config.model.template)
            require_task(read, classify=False, place=str(asked.general))
        if asked.score is not None:
            rows = judged_config(held_out, self.limit, train_on="last-assistant", like=config.data)
            shape = load_data(rows, self.tokenizer, model_limit=self.limit, template=config.model.template).shape.name
            if shape in ("text", "tokens"):
                raise DataError(
                    "a task score needs rows with prompts", code="E-DATA-412", place=config.data.path, found=f"rows of the shape {shape}",
                    remedy="leave --score-rows out", nothing_done="Nothing was trained.",
                )  # fmt: skip

    def held_out_rows(self, held_out: Path, config: RunConfig) -> int:
        """How many of the held-out rows a run with these settings is judged by."""
        data = config.data.model_copy(update={"path": str(held_out), "eval_path": None, "eval_rows": 0, "max_rows": None, "strict": False})
        model = config.model
        return len(load_data(data, self.tokenizer, model_limit=self.limit, template=model.template, labels=model.labels).train)


def check(reader: Reader, asked: Asked, held_out: Path, arms: Sequence[tuple[str, RunConfig]]) -> None:
    """Raise now what the judging after all runs would find, and ConfigError for settings that are not judged by the same held-out rows."""
    counts: dict[str, int] = {}
    of_template: dict[str | None, tuple[str, RunConfig]] = {}
    for name, config in arms:
        of_template.setdefault(config.model.template, (name, config))
    for name, config in of_template.values():
        reader.require_judgeable(asked, held_out, config)
        counts[name] = reader.held_out_rows(held_out, config)
    if len(set(counts.values())) > 1:
        raise ConfigError(
            "all settings of a comparison are judged by the same held-out rows", code="E-CONF-424", place="model.template",
            found=", ".join(f"{name} by {count:,}" for name, count in counts.items()),
            remedy="give data.max_tokens a number that all held-out rows are within, or leave the long rows out of the file",
            nothing_done="Nothing was trained.",
        )  # fmt: skip


def _digest(general: str | None) -> str | None:
    return next(iter(digests_of(general).values()), None)


def judged(folder: Folder, asked: Asked, name: str, seed: int, outcome: dict[str, Any]) -> dict[str, Any]:
    """General text and task score of one run, from a process of its own; kept from before where the same was asked."""
    samples = asked.samples if seed == 0 else 0
    if not (asked.general or asked.score or samples):
        return {}
    place = folder.path / "judged" / name
    kept, log, told = (place / f"seed-{seed}.{kind}" for kind in ("json", "log", "order.json"))
    general = str(asked.general) if asked.general else None
    order = {
        "run": str(folder.path / "runs" / name / f"seed-{seed}"), "threads": outcome["threads"], "before": seed == 0,
        "general": general, "general_sha256": _digest(general), "held_out": str(folder.path / "rows" / "held-out.jsonl"),
        "score": asked.score, "samples": samples,
    }  # fmt: skip
    before, answer = read_json(told) or {}, read_json(kept)
    if answer is not None and all(key in before and before[key] == order[key] for key in COMPARED):
        return dict(answer)
    folder.say(f"judging {name}, seed {seed}")
    place.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    write_json(told, order)
    if code := call(folder, ["halfbyte.studies.judge", str(told), str(kept)], log):
        raise failure(code, log)
    return dict(read_json(kept))


def notes(judgements: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of the rows that were judged; they are the same for all settings, so it is said once."""
    known: dict[str, Any] = {}
    for one in reversed(judgements):
        known |= {key: value for key, value in one.items() if value}
    found = []
    if left := known.get("general_left_out"):
        found.append(f"General text: {left:,} of {left + known['general_rows']:,} texts were left out, over the model's limit or empty.")
    if left := known.get("asked_left_out"):
        found.append(f"Answers: {left:,} of the held-out rows were not asked, over the model's limit or without an answer.")
    if short := known.get("asked_short"):
        found.append(f"Answers: {short:,} had room for fewer tokens than asked for, up to the model's limit.")
    if why := known.get("no_answers"):
        found.append(f"No answers are shown: {why}.")
    return found
