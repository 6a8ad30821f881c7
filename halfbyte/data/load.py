"""From the data settings to examples: read, detect, split, tokenize, and look for duplicates and overlap.

The evaluation rows come from data.eval_path, from the folder's valid/eval file, or from the training rows: those whose content hash
is smallest, so that the choice depends on nothing but the rows and equal rows stay on one side.  The digest names all that decides the
tokens: the files' bytes, the tokenizer, the template, the settings, and the tokens themselves.
"""

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from halfbyte.config.data import DataConfig
from halfbyte.data.encoding import Encoder
from halfbyte.data.faults import NOTHING, Problem, Problems, error_of
from halfbyte.data.rows import Rows, part_of_folder, read_rows
from halfbyte.data.samples import Conversation, Sample, Shape, detect, samples_of
from halfbyte.data.templates import Template, from_tokenizer
from halfbyte.data.tokenize import DataReport, Example, Tokenized, class_names, tokenize
from halfbyte.errors import DataError

FORMAT = "halfbyte data 1"
EVAL_SHARE, EVAL_MOST = 0.1, 200
NOT_IN_DIGEST = {"path", "eval_path", "workers", "packing", "max_tokens"}
"""Where the bytes lie, and how rows are put together later; what max_tokens does to a row shows in its tokens."""


@dataclass(frozen=True)
class TrainData:
    """Examples to train on and to evaluate on, the report on both, the identity of the data, its shape, the classes of a classifier, and
    the time that the template was told (a resumed run gives it back)."""

    train: list[Example]
    eval: list[Example]
    report: DataReport
    digest: str
    shape: Shape
    labels: tuple[str, ...] = ()
    now: str = ""
    notes: list[str] = field(default_factory=list)


def load_data(
    config: DataConfig,
    tokenizer: Any,
    *,
    model_limit: int | None = None,
    template: Template | str | Path | None = None,
    labels: Sequence[str] = (),
    now: datetime.datetime | None = None,
) -> TrainData:
    """Read and tokenize the data; `template` is a Template, the path of a .jinja file, or None for the tokenizer's own.

    Raises DataError, and ModelError for a template that is missing or breaks a limit.
    """
    notes: list[str] = []
    rows, shape, samples = read_samples(config.path, config, config.shape, notes, config.max_rows)
    held_out, eval_digest = _eval_samples(config, shape, notes)
    duplicates = _duplicates(samples, config)
    one_file = held_out is None
    if held_out is None:
        samples, held_out = split(samples, config.eval_rows)
    elif (overlap := _overlap(samples, held_out, config)) is not None:
        notes.append(overlap)
    if duplicates:
        notes.append(duplicates)
    own = not isinstance(template, Template)
    conversations = any(isinstance(sample, Conversation) for sample in samples)
    used = _template(template, tokenizer, shape, now) if conversations else None
    try:
        names = tuple(labels) or class_names([*samples, *held_out])
        cut = partial(tokenize, tokenizer=tokenizer, template=used, config=config, model_limit=model_limit, labels=names)
        train = cut(samples, others=len(held_out) if one_file else 0)
        evaluated = cut(held_out, beside=train.report if one_file else None) if held_out else None
        digest = _digest(config, rows, eval_digest, tokenizer, used, train, evaluated)
    finally:
        if used is not None and own:
            used.close()
    if used is not None:
        notes += _template_notes(used)
    notes += train.report.notes
    notes += [f"held out: {note}" for note in (evaluated.report.notes if evaluated else []) if note not in train.report.notes]
    report = replace(train.report, notes=notes)
    return TrainData(
        train.examples,
        evaluated.examples if evaluated else [],
        report,
        digest,
        shape,
        names,
        "" if used is None else used.now.isoformat(),
        notes,
    )


def require_task(data: TrainData, *, classify: bool, place: str) -> None:
    """Raise DataError unless these rows serve what the model does: choose a label, or write text."""
    if classify and data.shape.name == "classification" and len(data.labels) > 1:
        return
    if not classify and data.shape.name != "classification":
        return
    wanted = "in each row a text and one of two or more labels" if classify else "conversations, prompts and answers, or plain text"
    raise DataError(
        "rows with labels train a classifier, all others a language model",
        code="E-DATA-092",
        place=place,
        found=f"the shape {data.shape.name}" + (f" with the labels {', '.join(data.labels[:3])}" if data.labels else ""),
        expected=wanted,
        remedy="name other rows" if classify else "set model.task=sequence-classification, or data.shape",
        nothing_done=NOTHING,
    )


def read_samples(
    path: str | Path, config: DataConfig, shape: str, notes: list[str], max_rows: int | None = None
) -> tuple[Rows, Shape, list[Sample]]:
    """Rows, shape and samples of a file, all that is wrong with its rows told at once; notes are added to `notes`."""
    problems = Problems(config.skip_bad_rows)
    rows = read_rows(path, max_rows=max_rows, problems=problems)
    try:
        found = detect(rows.rows, shape, text_field=config.text_field, label_field=config.label_field, problems=problems)
    except DataError:
        problems.settle()  # lines that cannot be read come first
        raise
    samples = samples_of(rows.rows, found, problems=problems)
    notes += [*rows.notes, *problems.settle()]
    return rows, found, samples


def _template_notes(template: Template) -> list[str]:
    """What a user should know of a template before training."""
    notes = []
    if template.tells_time:
        notes.append(f"the chat template writes the date {template.now:%d %b %Y} into each row")
    if template.turns.aside and not template.plain:
        notes.append(f"the chat template puts {json.dumps(template.turns.aside)} between the prompt and an answer; it is not trained")
    if not template.turns.fits:
        prompt = json.dumps(template.turns.prompt, ensure_ascii=False)
        notes.append(f"the chat template asks for an answer with {prompt}, which does not stand before the answers of these rows")
    return notes


def _template(template: Template | str | Path | None, tokenizer: Any, shape: Shape, now: datetime.datetime | None) -> Template:
    return template if isinstance(template, Template) else from_tokenizer(tokenizer, template, shape=shape.name, now=now)


def _eval_samples(config: DataConfig, shape: Shape, notes: list[str]) -> tuple[list[Sample] | None, str]:
    """Samples of the evaluation file, when there is one, and its digest."""
    path: str | Path | None = config.eval_path or part_of_folder(config.path, "eval")
    if path is None:
        return None, ""
    rows, _, samples = read_samples(path, config, shape.name, notes)
    return list(samples), rows.digest


def content_hash(sample: Sample) -> str:
    """sha256 of what a sample says, without its place."""
    values = {name: value for name, value in vars(sample).items() if name not in ("place", "row")}
    if isinstance(sample, Conversation):
        values["messages"] = [(message.as_dict(), message.trained) for message in sample.messages]
    return hashlib.sha256(json.dumps([type(sample).__name__, values], sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def split(samples: Sequence[Sample], eval_rows: int | str) -> tuple[list[Sample], list[Sample]]:
    """(train, eval): whole groups of equal rows in order of their hash until `eval_rows` rows are held out (auto: a tenth, at most 200)."""
    wanted = min(int(EVAL_SHARE * len(samples)), EVAL_MOST) if eval_rows == "auto" else int(eval_rows)
    if wanted >= len(samples) and wanted:
        raise error_of(
            Problem("E-DATA-085", samples[0].place if samples else "the data", found=f"{wanted:,} evaluation rows of {len(samples):,}")
        )
    groups: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(content_hash(sample), []).append(number)
    held: set[int] = set()
    for key in sorted(groups):
        if len(held) + len(groups[key]) <= wanted:
            held.update(groups[key])
    return [one for number, one in enumerate(samples) if number not in held], [one for number, one in enumerate(samples) if number in held]


def _duplicates(samples: Sequence[Sample], config: DataConfig) -> str:
    """The note on exact duplicates; refused in strict mode."""
    seen: dict[str, str] = {}
    again = []
    for sample in samples:
        key = content_hash(sample)
        if key in seen:
            again.append((sample.place, seen[key]))
        seen.setdefault(key, sample.place)
    if not again:
        return ""
    words = f"{len(again):,} exact duplicates ({100 * len(again) / len(samples):.1f} %), first {again[0][0]}, equal to {again[0][1]}"
    if config.strict:
        raise error_of(Problem("E-DATA-067", again[0][0], found=words))
    return words


def _overlap(train: Sequence[Sample], held_out: Sequence[Sample], config: DataConfig) -> str | None:
    """The note on evaluation rows that are also trained on; refused in strict mode."""
    trained = {content_hash(sample) for sample in train}
    both = [sample.place for sample in held_out if content_hash(sample) in trained]
    if not both:
        return None
    words = f"{len(both):,} evaluation rows are also training rows, first {both[0]}"
    if config.strict:
        raise error_of(Problem("E-DATA-068", both[0], found=words))
    return words


def _digest(
    config: DataConfig,
    rows: Rows,
    eval_digest: str,
    tokenizer: Any,
    template: Template | None,
    train: Tokenized,
    evaluated: Tokenized | None,
) -> str:
    """sha256 over everything that decides the tokens, and over the tokens."""
    settings = config.model_dump(mode="json", exclude=NOT_IN_DIGEST)
    parts = [
        FORMAT,
        rows.digest,
        eval_digest,
        Encoder(tokenizer).identity,
        template.identity() if template else "",
        json.dumps(settings, sort_keys=True),
    ]
    made = hashlib.sha256()
    for part in parts:
        made.update(hashlib.sha256(part.encode()).digest())
    for example in [*train.examples, *(evaluated.examples if evaluated else [])]:
        made.update(json.dumps([example.input_ids, example.labels, example.label]).encode())
    return made.hexdigest()
