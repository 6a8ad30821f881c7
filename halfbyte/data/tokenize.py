"""Samples to token ids and labels, and the report of what was kept, dropped and cut.

    text     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    labels    -   -   -   -   -   -   -   -      -     -    Hello <|im_end|>  -         labels[i] is input_ids[i] or -100

Rules: the first label of a sample is -100 (nothing predicts it); a row without anything to learn is dropped and counted, and more than
5 % of such rows are refused; a row over `max_tokens` is dropped, or loses the left of its prompt but never any of its answer, or is
refused; a template that closes no answer with a token of the tokenizer is refused.  The one shift of labels is in `models/token_loss.py`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.config.data import DataConfig
from halfbyte.data.encoding import Encoder, Span, class_tokens, labels_of
from halfbyte.data.faults import NOTHING, SHOWN, Problem, combined, error_of, shown
from halfbyte.data.samples import ClassSample, Conversation, Sample, TextSample, TokenSample
from halfbyte.data.templates import Rendered, Template, special_tokens
from halfbyte.errors import ConfigError, nearest

IGNORED = -100
UNLEARNABLE_SHARE = 0.05
TOKENS_LIMIT = 10_000_000
AUTO_MAX_TOKENS = 1024
CHUNK = 512


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one row (labels[i] is input_ids[i] or -100), its number and place; `label` is the class, if any."""

    input_ids: list[int]
    labels: list[int]
    row: int
    place: str = ""
    label: int | None = None


@dataclass(frozen=True)
class DataReport:
    """What became of the rows; `dropped` counts rows by reason, `tokens_dropped` their tokens and those cut off."""

    rows: int
    kept: int
    dropped: dict[str, int]
    cut: int
    tokens: int
    trained_tokens: int
    tokens_dropped: int
    longest: int
    longest_place: str
    max_tokens: int
    stop_token_text: str
    stop_token_id: int | None
    labels: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tokenized:
    """Examples in the order of their rows, and the report."""

    examples: list[Example]
    report: DataReport


@dataclass
class _Tally:
    """Counts while rows are tokenized."""

    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cut: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    longest: int = 0
    longest_place: str = ""
    too_long: int = 0
    plain_places: list[str] = field(default_factory=list)
    stops: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def tokenize(
    samples: Sequence[Sample],
    tokenizer: Any,
    template: Template | None,
    config: DataConfig,
    *,
    model_limit: int | None = None,
    labels: Sequence[str] = (),
    others: int = 0,
    beside: DataReport | None = None,
) -> Tokenized:
    """Tokenize all samples; `template` may be None when no sample is a conversation; `labels` are the classes of a classifier.

    Of one file that is split: `others` is how many of its rows are still to come, `beside` the report of those before.  What is too much
    to drop is a share of the whole file, and of the later part nothing need be left.
    """
    limit = max_tokens_of(config, model_limit)
    encoder, tally = Encoder(tokenizer), _Tally()
    problems: list[Problem] = []
    examples: list[Example] = []
    names = tuple(labels) or class_names(samples)
    for start in range(0, len(samples), CHUNK):
        for made in _chunk(samples[start : start + CHUNK], tokenizer, template, encoder, config, tally, names):
            if isinstance(made, Problem):
                problems.append(made)
            elif (fitted := fit(made, limit, config.long_rows, tokenizer.bos_token_id, tally, problems)) is not None:
                examples.append(fitted)
    if problems:
        raise combined(problems)
    _settle(samples, examples, tally, limit, others, beside)
    stop_text, stop_id = _stop(samples, tally, tokenizer)
    return Tokenized(examples, _report(samples, examples, tally, limit, stop_text, stop_id, names))


def max_tokens_of(config: DataConfig, model_limit: int | None) -> int:
    """The longest row in tokens: the setting, or the model's own limit capped at 1,024.  Raises ConfigError for more than that limit."""
    if config.max_tokens == "auto":
        return min(model_limit or AUTO_MAX_TOKENS, AUTO_MAX_TOKENS)
    if model_limit is not None and config.max_tokens > model_limit:
        raise ConfigError(
            "rows must fit into what the model can see",
            code="E-CONF-067",
            place="data.max_tokens",
            found=f"{config.max_tokens:,}",
            expected=f"at most {model_limit:,}, the positions that the model's config.json names",
            remedy="lower data.max_tokens, or leave it out",
            nothing_done=NOTHING,
        )
    return int(config.max_tokens)


def class_names(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The classes found, numbers in order of value, else in order of the alphabet."""
    found = {sample.label for sample in samples if isinstance(sample, ClassSample)}
    return tuple(sorted(found, key=lambda name: (int(name), "") if name.isdecimal() else (2**63, name)))


def _chunk(
    samples: Sequence[Sample],
    tokenizer: Any,
    template: Template | None,
    encoder: Encoder,
    config: DataConfig,
    tally: _Tally,
    names: tuple[str, ...],
) -> list[Example | Problem]:
    """Examples of some samples, in order; those with nothing to learn are counted and left out."""
    rendered = _rendered(samples, tokenizer, template, config, tally)
    made: list[Example | Problem] = []
    encoded = iter(
        encoder.encode_all(
            [one.text for one in rendered if isinstance(one, Rendered)], [one.plain for one in rendered if isinstance(one, Rendered)]
        )
    )
    for sample, text in zip(samples, rendered):
        if isinstance(text, Problem):
            made.append(text)
        elif isinstance(text, Rendered):
            one = _example(sample, text, next(encoded), tally)
            if one is not None:
                made.append(one)
        elif isinstance(sample, TokenSample):
            made += _given(sample, len(tokenizer), tally)
        elif isinstance(sample, ClassSample):
            made += _classified(sample, tokenizer, names, tally)
    return made


def _rendered(
    samples: Sequence[Sample], tokenizer: Any, template: Template | None, config: DataConfig, tally: _Tally
) -> list[Rendered | Problem | None]:
    """The text and spans of each sample that is text; None for the others and for those dropped."""
    made: list[Rendered | Problem | None] = [None] * len(samples)
    conversations: list[tuple[int, Conversation]] = []
    frame: _Frame | None = None
    for number, sample in enumerate(samples):
        if isinstance(sample, TextSample):
            frame = frame or _Frame.of(tokenizer)
            made[number] = _plain_text(sample, frame, tally)
        elif isinstance(sample, Conversation):
            reason = nothing_to_learn(sample, config.train_on)
            if reason:
                tally.drop(reason)
            elif template is None or (template.plain and sample.chat):
                made[number] = Problem(
                    "E-DATA-063",
                    sample.place,
                    found="a conversation, but the model has no chat template",
                    remedy="give a template with --template FILE.jinja",
                )
            else:
                conversations.append((number, sample))
    if conversations:
        assert template is not None
        for (number, _), one in zip(conversations, template.spans_of([sample for _, sample in conversations], config.train_on)):
            made[number] = one
    return made


def nothing_to_learn(sample: Conversation, train_on: str) -> str:
    """Why a conversation trains nothing; "" when it does."""
    answers = [message for message in sample.messages if message.role == "assistant"]
    if not answers:
        return "no assistant text"
    wanted = [message for message in (answers[-1:] if train_on == "last-assistant" else answers) if message.trained]
    if not wanted:
        return "no assistant message is to be trained"
    empty = [message for message in wanted if not message.content.strip() and not message.extra.get("tool_calls")]
    return "an empty assistant message" if empty else ""


@dataclass(frozen=True)
class _Frame:
    """What stands around plain text (begin and end token, where the tokenizer has them), and the pattern of all special tokens."""

    first: str
    last: str
    special: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> "_Frame":
        begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        tokens = sorted(filter(None, special_tokens(tokenizer)), key=lambda one: (-len(one), one))
        pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        return cls(tokenizer.bos_token if begins else "", tokenizer.eos_token or "", pattern)


def _plain_text(sample: TextSample, frame: _Frame, tally: _Tally) -> Rendered | None:
    """Text between the begin and the end token."""
    if not sample.text.strip():
        tally.drop("empty text")
        return None
    text = frame.first + sample.text + frame.last
    at = len(frame.first)
    plain = [(at + match.start(), at + match.end()) for match in frame.special.finditer(sample.text)]
    return Rendered(text, [(0, len(text))], plain, frame.last)


def _example(sample: Sample, text: Rendered, encoded: tuple[list[int], list[Span]] | None, tally: _Tally) -> Example | Problem | None:
    if encoded is None:
        return Problem("E-DATA-069", sample.place, found=", ".join(shown(text.text[start:end]) for start, end in text.plain))
    ids, offsets = encoded
    if len(ids) > TOKENS_LIMIT:
        return Problem("E-DATA-066", sample.place, found=f"{len(ids):,} tokens")
    if text.plain:
        tally.plain_places.append(sample.place)
    labels = labels_of(ids, offsets, text.spans)
    tally.stops[text.stop] = tally.stops.get(text.stop, 0) + 1
    return Example(ids, [IGNORED, *labels[1:]], sample.row, sample.place)


def _given(sample: TokenSample, vocabulary: int, tally: _Tally) -> list[Example | Problem]:
    wrong = next((at for at, one in enumerate(sample.input_ids) if one >= vocabulary), None)
    if wrong is not None:
        found = f"{sample.input_ids[wrong]:,} at input_ids[{wrong}], the vocabulary has {vocabulary:,}"
        return [Problem("E-DATA-052", sample.place, field="input_ids", found=found)]
    if len(sample.input_ids) > TOKENS_LIMIT:
        return [Problem("E-DATA-066", sample.place, field="input_ids", found=f"{len(sample.input_ids):,} tokens")]
    labels = [IGNORED, *sample.labels[1:]]
    if all(label == IGNORED for label in labels):
        tally.drop("no label")
        return []
    return [Example(list(sample.input_ids), labels, sample.row, sample.place)]


def _classified(sample: ClassSample, tokenizer: Any, names: tuple[str, ...], tally: _Tally) -> list[Example | Problem]:
    ids = class_tokens(sample.text, tokenizer)
    if not ids:
        tally.drop("empty text")
        return []
    if sample.label not in names:
        return [
            Problem("E-DATA-055", sample.place, found=shown(sample.label), expected=", ".join(names), remedy=nearest(sample.label, names))
        ]
    return [Example(ids, [IGNORED] * len(ids), sample.row, sample.place, names.index(sample.label))]


def fit(example: Example, limit: int, long_rows: str, bos_id: int | None, tally: _Tally, problems: list[Problem]) -> Example | None:
    """The example within `limit` tokens: as it is, with the left of its prompt cut (a begin token stays), or None, counted."""
    length = len(example.input_ids)
    tally.tokens_in += length
    if length > tally.longest:
        tally.longest, tally.longest_place = length, example.place
    if length > limit:
        tally.too_long += 1
        if long_rows == "refuse":
            problems.append(Problem("E-DATA-062", example.place, found=f"{length:,} tokens", expected=f"at most {limit:,} tokens"))
            return None
        cut = cut_prompt(example, limit, bos_id) if long_rows == "cut-prompt" else None
        if cut is None:
            tally.drop(f"over {limit:,} tokens")
            return None
        tally.cut += 1
        example = cut
    if example.label is None and all(label == IGNORED for label in example.labels):
        tally.drop("nothing to train on")
        return None
    tally.tokens_out += len(example.input_ids)
    return example


def cut_prompt(example: Example, limit: int, bos_id: int | None) -> Example | None:
    """The example without the first tokens of its prompt; None when its answers alone, with one token before them, are over the limit."""
    first = next((at for at, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
    keeps_bos = bos_id is not None and example.input_ids[0] == bos_id
    away = len(example.input_ids) - limit + keeps_bos
    if away + (not keeps_bos) > first:
        return None  # the first answer token needs a token before it
    head = 1 if keeps_bos else 0
    return replace(
        example, input_ids=[*example.input_ids[:head], *example.input_ids[away:]], labels=[*example.labels[:head], *example.labels[away:]]
    )


def _settle(
    samples: Sequence[Sample], examples: Sequence[Example], tally: _Tally, limit: int, others: int, beside: DataReport | None
) -> None:
    """Notes for what was dropped; refusals when too much was."""
    dropped = Counter(tally.dropped) + Counter(beside.dropped if beside else {})
    unlearnable = {reason: count for reason, count in dropped.items() if not reason.startswith("over ")}
    rows = len(samples) + others + (beside.rows if beside else 0)
    if sum(unlearnable.values()) > UNLEARNABLE_SHARE * rows:
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in unlearnable.items())
        raise error_of(Problem("E-DATA-060", file_of(samples), found=f"{sum(unlearnable.values()):,} of {rows:,} rows: {reasons}"))
    for reason, count in tally.dropped.items():
        if not reason.startswith("over "):
            tally.notes.append(f"{count:,} of {len(samples):,} rows dropped: {reason}")
    if tally.too_long:
        lost = tally.tokens_in - tally.tokens_out
        what = f"{tally.too_long - tally.cut:,} dropped, {tally.cut:,} cut" if tally.cut else "dropped"
        tally.notes.append(
            f"{tally.too_long:,} of {len(samples):,} rows exceed {limit:,} tokens (longest {tally.longest:,}, {tally.longest_place}); "
            f"{what}, {100 * lost / tally.tokens_in:.1f} % of tokens"
        )
    if tally.plain_places:
        places = ", ".join(tally.plain_places[:SHOWN])
        tally.notes.append(f"{len(tally.plain_places):,} rows contain special tokens as text; kept as plain text ({places})")
    if not examples and beside is not None:
        tally.notes.append(f"none of the {len(samples):,} rows are left, so nothing is evaluated")
    elif not examples:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.dropped.items()) or "no rows"
        raise error_of(
            Problem("E-DATA-061", file_of(samples), found=f"no rows left: {reasons}; longest {tally.longest:,} tokens, limit {limit:,}")
        )


def file_of(samples: Sequence[Sample]) -> str:
    """The file of the first sample."""
    place = samples[0].place if samples else "the data"
    return place.rpartition(" line ")[0] or place.rpartition(" row ")[0] or place


def _stop(samples: Sequence[Sample], tally: _Tally, tokenizer: Any) -> tuple[str, int | None]:
    """The text and id of the stop token that is trained; refuses conversations none of which trains one."""
    if not tally.stops:
        return "", None
    text = max(tally.stops, key=lambda one: (bool(one), tally.stops[one]))
    token = tokenizer.convert_tokens_to_ids(text) if text else None
    if token is None or token == tokenizer.unk_token_id != tokenizer.eos_token_id:
        if any(isinstance(sample, Conversation) for sample in samples):
            found = f"{shown(text)} is not one token" if text else "answers without an end token"
            raise error_of(Problem("E-DATA-065", file_of(samples), found=found))
        tally.notes.append("the tokenizer has no end token: the model is not taught to stop")
        return "", None
    missing = tally.stops.get("", 0)
    if missing:
        tally.notes.append(f"{missing:,} rows end without the stop token {shown(text)}")
    if token != tokenizer.eos_token_id:
        tally.notes.append(
            f"answers end with {shown(text)} (token {token}); the tokenizer's own end token is {shown(tokenizer.eos_token or 'none')}"
        )
    return text, int(token)


def _report(
    samples: Sequence[Sample],
    examples: Sequence[Example],
    tally: _Tally,
    limit: int,
    stop_text: str,
    stop_id: int | None,
    names: tuple[str, ...],
) -> DataReport:
    tokens = sum(len(one.input_ids) for one in examples)
    if tokens != tally.tokens_out:
        raise error_of(Problem("E-DATA-070", file_of(samples), found=f"{tally.tokens_out:,} tokens kept, {tokens:,} in the rows"))
    trained = sum(label != IGNORED for one in examples for label in one.labels)
    return DataReport(
        rows=len(samples), kept=len(examples), dropped=dict(tally.dropped), cut=tally.cut, tokens=tokens, trained_tokens=trained,
        tokens_dropped=tally.tokens_in - tally.tokens_out, longest=tally.longest, longest_place=tally.longest_place, max_tokens=limit,
        stop_token_text=stop_text, stop_token_id=stop_id, labels=names, notes=list(tally.notes),
    )  # fmt: skip
