"""How long the rows of a data file are, without loading transformers: an estimate for a plan.

    rows of the model's own template     rendered as training does, the first RENDERED of them; what the template adds to a row and to
                                         a message is taken from them for the others
    no template, or no tokenizer         the texts of the fields, and MESSAGE_TOKENS a message

Text is counted with the model's tokenizer.json where it is at hand, else as one token for CHARACTERS_PER_TOKEN characters.  A file whose
shape is not known is counted by all the texts in it.  Training counts exactly.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from halfbyte.config.data import DataConfig
from halfbyte.data.faults import Problems
from halfbyte.data.rows import Row, read_rows
from halfbyte.data.samples import ClassSample, Conversation, Sample, TextSample, detect, samples_of
from halfbyte.data.spans import job
from halfbyte.data.templates import WITHOUT_CHAT, Template
from halfbyte.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTERS_PER_TOKEN = 3
MESSAGE_TOKENS = 5
RENDERED = 2000
BATCH = 1000

Count = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Lengths:
    """Estimated tokens of each row; `how` says how they were counted."""

    tokens: tuple[int, ...]
    how: str

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.tokens)


def texts_of(value: Any) -> list[str]:
    """All texts in a row, whatever its shape.

    >>> texts_of({"messages": [{"role": "user", "content": "hi"}], "n": 3})
    ['user', 'hi']
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_of(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in texts_of(inner)]
    return []


def lengths(data: DataConfig, tokenizer: Path | None = None) -> Lengths:
    """Estimated lengths of the rows that `data` names, in the columns it names; raises DataError for a file that cannot be read."""
    rows = read_rows(data.path, max_rows=data.max_rows).rows
    try:
        shape = detect(rows, data.shape, text_field=data.text_field, label_field=data.label_field)
        samples, name = samples_of(rows, shape, problems=Problems()), shape.name
    except DataError:  # training says what is wrong with them
        samples, name = [], ""
    samples = samples or [_as_text(row) for row in rows]
    if tokenizer is None:
        return Lengths(_plain(samples, by_characters), f"one token for {CHARACTERS_PER_TOKEN} characters")
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    count, frame = _counter(loaded), 1 + bool(loaded.encode("").ids)
    if not any(isinstance(sample, Conversation) for sample in samples):
        return Lengths(_plain(samples, count, frame), "the model's tokenizer")
    with template_of(tokenizer.parent, loaded, name) as template:
        counted = _plain(samples, count, frame) if template is None else _rendered(samples, template, count, frame)
    return Lengths(counted, "the model's tokenizer" + ("" if template is None else " and template"))


def by_characters(texts: Sequence[str]) -> list[int]:
    """Tokens of texts without a tokenizer."""
    return [-(-len(text) // CHARACTERS_PER_TOKEN) for text in texts]


def _counter(tokenizer: "Tokenizer") -> Count:
    def count(texts: Sequence[str]) -> list[int]:
        batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
        return [len(encoded.ids) for batch in batches for encoded in tokenizer.encode_batch(list(batch), add_special_tokens=False)]

    return count


def _as_text(row: Row) -> TextSample:
    return TextSample("\n".join(texts_of(row.values)), row.place)


def _text(sample: Sample) -> str:
    """What a row says, without what a template adds."""
    if isinstance(sample, Conversation):
        texts = [*(text for message in sample.messages for text in texts_of([message.content, message.extra])), *texts_of(sample.tools)]
        return "\n".join(texts)
    return sample.text if isinstance(sample, TextSample | ClassSample) else ""


def _plain(samples: Sequence[Sample], count: Count, frame: int = 1, row: float = 0, message: float = MESSAGE_TOKENS) -> tuple[int, ...]:
    """Tokens of what the rows say, and around it `row` + `message` x messages for a conversation, `frame` (begin and end) for a text."""
    counts = count([_text(sample) for sample in samples])
    return tuple(
        round(tokens + row + message * len(sample.messages)) if isinstance(sample, Conversation)
        else tokens + frame if isinstance(sample, TextSample | ClassSample)
        else len(sample.input_ids)
        for sample, tokens in zip(samples, counts, strict=True)
    )  # fmt: skip


def _rendered(samples: Sequence[Sample], template: Template, count: Count, frame: int) -> tuple[int, ...]:
    """Tokens of rendered conversations; those beyond the first RENDERED get what the template adds to a message of these on the mean."""
    first = [sample for sample in samples[:RENDERED] if isinstance(sample, Conversation)]
    try:
        made = template.render_all([job([one.as_dict() for one in sample.messages], sample.tools) for sample in first])
    except ModelError:  # a template over its limits: training will say so
        return _plain(samples, count, frame)
    told = [(number, text) for number, text in enumerate(made) if isinstance(text, str)]
    counts = dict(zip([number for number, _ in told], count([text for _, text in told]), strict=True))
    bare = count([_text(sample) for sample in first])
    added = line([(len(first[number].messages), counts[number] - bare[number]) for number in counts])
    every = list(_plain(samples, count, frame, *added))
    for number, tokens in counts.items():
        every[number] = tokens  # all rows of a file have one shape, so the first conversations are the first rows
    return tuple(every)


def line(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """(tokens of a row, tokens of each of its messages) nearest to what a template added to rows of so many messages.

    >>> line([(2, 14), (4, 24), (2, 14)])
    (4.0, 5.0)
    """
    if len({messages for messages, _ in points}) < 2:
        return (sum(more for _, more in points) / len(points) - MESSAGE_TOKENS * points[0][0] if points else 0.0), MESSAGE_TOKENS
    slope, start = linear_regression(*zip(*points, strict=True))
    return start, slope


@contextmanager
def template_of(folder: Path, tokenizer: "Tokenizer", shape: str) -> Iterator[Template | None]:
    """The template that training would use, from the files beside tokenizer.json; None where conversations have none."""
    settings = _settings(folder / "tokenizer_config.json")
    names = {name: value.get("content") if isinstance(value, dict) else value for name, value in settings.items()}
    specials: dict[str, Any] = {name: text for name, text in names.items() if name.endswith("_token") and isinstance(text, str)}
    file, source = folder / "chat_template.jinja", settings.get("chat_template")
    if file.is_file():
        source = file.read_text(encoding="utf-8", errors="replace")
    elif isinstance(source, list):
        source = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}.get("default")
    if not source:
        ids = tokenizer.encode("a").ids
        specials.setdefault("eos_token", "")
        specials["add_bos"] = bool(ids) and ids[0] == tokenizer.token_to_id(specials.get("bos_token", ""))
        source = WITHOUT_CHAT.get(shape)
    if not isinstance(source, str):
        yield None
        return
    with Template(source, specials) as template:
        yield template


def _settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
