"""Judge an opened model by the rows of a file: loss and perplexity, and by choice its own answers or labels.

    loss X          sum of the token losses / trained tokens, the same for every batch size
    exact_match ..  the model answers each row's prompt, greedily, and the answer is compared with the row's own

Of a conversation with several turns the last assistant message is the one that is answered.  Rows that are too long are left out of both
and counted.  A classifier gives the share of right labels and their macro F1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.config import DataConfig, make
from halfbyte.data.batches import Batch, Batches
from halfbyte.data.load import TrainData, load_data, require_task
from halfbyte.data.tokenize import Example
from halfbyte.errors import ConfigError, DataError
from halfbyte.evaluate import generation
from halfbyte.evaluate.classification import evaluate_classes
from halfbyte.evaluate.loss import evaluate_loss
from halfbyte.evaluate.opened import Opened
from halfbyte.evaluate.prompts import prompt_of
from halfbyte.models.generate import generate
from halfbyte.models.load import token_limit

COLUMNS = ("text_field", "label_field")
ANSWER_TOKENS = 128


def evaluate_rows(
    opened: Opened,
    data: str | Path,
    *,
    metrics: Sequence[str] = (),
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    max_rows: int | None = None,
    own_columns: bool = True,
) -> dict[str, float | int]:
    """loss, perplexity, tokens, rows, rows_left_out where some were, then the scores asked for, in this order; of a classifier loss, rows,
    rows_left_out, accuracy, macro_f1.

    max_new_tokens  the longest answer, with `metrics`; ANSWER_TOKENS unless given
    own_columns     read the columns that the run's settings name; not for rows of another kind
    Raises DataError and ConfigError.
    """
    _check_answers(opened, metrics, max_new_tokens)
    read = _read(opened, data, max_rows, opened.train_on, own_columns)
    batches = batches_of(read.train, opened, batch_size)
    seen = evaluate_loss(opened.model, batches)
    of_text = {} if opened.labels else {"perplexity": seen.perplexity, "tokens": seen.tokens}
    found: dict[str, float | int] = {"loss": seen.loss, **of_text, "rows": len(read.train)}
    if left_out := sum(read.report.dropped.values()):
        found["rows_left_out"] = left_out
    if opened.labels:
        return {**found, **evaluate_classes(opened.model, batches)}
    if not metrics:
        return found
    longest = ANSWER_TOKENS if max_new_tokens is None else max_new_tokens
    answered = answer_rows(opened, data, batch_size=batch_size, max_new_tokens=longest, max_rows=max_rows)
    return {**found, **generation.score(answered.answers, answered.references, metrics)}


@dataclass(frozen=True)
class Answered:
    """The model's greedy answers to the rows of a file, beside what it was asked and the rows' own answers; how many rows were over the
    model's limit and not asked, and how many answers had room for fewer tokens than wanted."""

    prompts: list[str]
    references: list[str]
    answers: list[str]
    left_out: int = 0
    short: int = 0


def answer_rows(
    opened: Opened,
    data: str | Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = ANSWER_TOKENS,
    max_rows: int | None = None,
    to_limit: bool = False,
) -> Answered:
    """Let the model answer each row's prompt, of the first `max_rows` rows.

    to_limit  of rows within the model's limit the first are asked, and an answer ends where the limit does; else that is refused

    Raises DataError where a row has no prompt: plain text is not asked anything.
    """
    read = _read(opened, data, None if to_limit else max_rows, "last-assistant")
    asked_rows = read.train[:max_rows]
    prompts = [prompt_of(example) for example in asked_rows]
    if read.shape.name in ("text", "tokens") or not all(prompts):
        raise DataError(
            "answers can be scored only where a row has a prompt",
            code="E-DATA-082",
            place=str(data),
            found=f"rows of the shape {read.shape.name}",
            expected="messages, prompt and completion, or alpaca",
            remedy="leave --metrics out: the loss needs no prompt",
        )
    wanted = [row.input_ids[len(prompt) :] for row, prompt in zip(asked_rows, prompts)]
    asked, references = ([str(opened.tokenizer.decode(ids, skip_special_tokens=True)) for ids in part] for part in (prompts, wanted))
    limit = token_limit(opened.source) if to_limit else None
    rooms = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    answers: dict[int, str] = {}
    for room in sorted(set(rooms)):  # every prompt is shorter than the limit: its row is not longer, and has an answer
        chosen = [number for number, own in enumerate(rooms) if own == room]
        told = generate(
            opened.model, opened.tokenizer, [prompts[number] for number in chosen], max_new_tokens=room, batch_size=batch_size
        )  # fmt: skip
        answers.update(zip(chosen, told, strict=True))
    return Answered(
        asked, references, [answers[number] for number in range(len(prompts))], sum(read.report.dropped.values()),
        sum(room < max_new_tokens for room in rooms),
    )  # fmt: skip


def loss_batches(opened: Opened, data: str | Path, *, batch_size: int = 8, max_rows: int | None = None) -> list[Batch]:
    """The rows of a file as batches whose loss can be taken again and again.  Raises DataError and ConfigError."""
    return batches_of(_read(opened, data, max_rows, opened.train_on).train, opened, batch_size)


def _check_answers(opened: Opened, metrics: Sequence[str], max_new_tokens: int | None) -> None:
    """Raise ConfigError where the metrics are unknown, or scores or a length of answers are asked for and there are no answers."""
    generation.require_known(metrics)
    asked = [name for name, given in (("--metrics", bool(metrics)), ("--max-new-tokens", max_new_tokens is not None)) if given]
    if asked and (opened.labels or not metrics):
        raise ConfigError(
            "these options belong to a model's own answers", code="E-CONF-098", place=" and ".join(asked),
            found="a classifier, which writes none" if opened.labels else "no --metrics", remedy=f"leave {' and '.join(asked)} out",
            expected="nothing: accuracy and macro_f1 are always told" if opened.labels else "--metrics NAMES with it",
            nothing_done="Nothing was judged.",
        )  # fmt: skip


def judged_config(
    data: str | Path, limit: int | None, *, train_on: str | None = None, like: DataConfig | None = None, max_rows: int | None = None
) -> DataConfig:
    """How rows are read to judge by them: up to the model's limit, whatever it was trained on, for models are compared on the same rows.

    train_on  None for a classifier      like  settings whose names of columns are read
    """
    longest = {"max_tokens": limit} if limit is not None else {}
    columns = {name: getattr(like, name) for name in COLUMNS} if like is not None else {}
    own = {"shape": "classification"} if train_on is None else {"train_on": train_on}
    return make(DataConfig, {"path": str(data), "eval_rows": 0, "max_rows": max_rows, **longest, **columns, **own}, "data")


def _read(opened: Opened, data: str | Path, max_rows: int | None, train_on: str, own_columns: bool = True) -> TrainData:
    limit, run = token_limit(opened.source), opened.located.config if own_columns else None
    config = judged_config(
        data, limit, train_on=None if opened.labels else train_on, like=None if run is None else run.data, max_rows=max_rows
    )
    read = load_data(config, opened.tokenizer, model_limit=limit, template=opened.template_path, labels=opened.labels)
    require_task(read, classify=bool(opened.labels), place=str(data))
    return read


def batches_of(examples: Sequence[Example], opened: Opened, batch_size: int) -> list[Batch]:
    """Examples as batches in their order, padded on the right.  Raises ConfigError for a batch without rows."""
    if batch_size < 1:
        raise ConfigError(
            "a batch holds at least one row", code="E-CONF-088", place="--batch-size", found=str(batch_size), expected="1 or more"
        )
    pad = opened.tokenizer.pad_token_id
    batches = Batches(
        examples, micro_batch_size=batch_size, global_batch_size=batch_size, seed=0, pad_id=0 if pad is None else pad, shuffle=False
    )
    return [batch for window in batches.epoch(0) for batch in window]
