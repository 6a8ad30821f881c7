"""Rows to samples: the shapes users have, found by looking at the field names and stated back.

| shape             | fields                                          | becomes        |
|-------------------|-------------------------------------------------|----------------|
| messages          | messages: [{role, content}], tools              | Conversation   |
| sharegpt          | conversations: [{from, value}], system, tools   | Conversation   |
| prompt-completion | prompt, completion: text or lists of messages   | Conversation   |
| alpaca            | instruction, input, output, system, history     | Conversation   |
| tokens            | input_ids, labels                               | TokenSample    |
| classification    | text, label                                     | ClassSample    |
| text              | text                                            | TextSample     |

A conversation says whether its row was written as a chat (`chat`) or as plain prompt and answer, which a model without a chat
template can train on as well.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.data.faults import Problem, Problems, error_of, shown
from halfbyte.data.rows import Row
from halfbyte.errors import nearest

ROLE_NAMES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool",
    "ipython": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
KEPT = ("tool_calls", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id")


@dataclass(frozen=True)
class Message:
    """One message; `extra` holds tool calls, reasoning and names for the template; `trained` is False for weight 0."""

    role: str
    content: str
    extra: dict[str, Any] = field(default_factory=dict)
    trained: bool = True

    def as_dict(self) -> dict[str, Any]:
        """What a chat template sees."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Conversation:
    """Messages in order, where they stand, their tools, and whether the row was written as a chat."""

    messages: tuple[Message, ...]
    place: str
    row: int = 0
    tools: list[Any] | None = None
    chat: bool = True


@dataclass(frozen=True)
class TextSample:
    """Plain text, all of it trained."""

    text: str
    place: str
    row: int = 0


@dataclass(frozen=True)
class TokenSample:
    """Tokens and labels as they are."""

    input_ids: list[int]
    labels: list[int]
    place: str
    row: int = 0


@dataclass(frozen=True)
class ClassSample:
    """A text and the name of its class."""

    text: str
    label: str
    place: str
    row: int = 0


Sample = Conversation | TextSample | TokenSample | ClassSample


@dataclass(frozen=True)
class Shape:
    """The shape of a file: its name, the fields used and ignored, why it was chosen; text and label field of classification."""

    name: str
    used: tuple[str, ...]
    ignored: tuple[str, ...]
    why: str
    text_field: str = "text"
    label_field: str = "label"


@dataclass(frozen=True)
class _Fields:
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


def _shapes(text_field: str, label_field: str) -> dict[str, _Fields]:
    """Fields of each shape, the most telling shape first."""
    return {
        "messages": _Fields(("messages",), ("tools",)),
        "sharegpt": _Fields(("conversations",), ("system", "tools")),
        "prompt-completion": _Fields(("prompt", "completion"), ("tools",)),
        "alpaca": _Fields(("instruction", "output"), ("input", "system", "history")),
        "tokens": _Fields(("input_ids",), ("labels", "attention_mask")),
        "classification": _Fields((text_field, label_field)),
        "text": _Fields((text_field,)),
    }


def detect(
    rows: Sequence[Row], shape: str = "auto", *, text_field: str = "text", label_field: str = "label", problems: Problems | None = None
) -> Shape:
    """The shape of the rows, by their field names; raises DataError when none fits, when rows differ, or when `shape` does not fit.

    With `problems`, rows of another shape than most are only noted there.
    """
    shapes = _shapes(text_field, label_field)
    columns: Counter[str] = Counter(name for row in rows for name, value in row.values.items() if value is not None)
    if shape == "auto":
        names = [_shape_of(row, shapes) for row in rows]
        shape = _one_shape(rows, names, columns, problems)
    fields = shapes[shape]
    if not any(set(fields.needed) <= row.values.keys() for row in rows):
        missing = [name for name in fields.needed if not columns[name]]
        raise error_of(
            Problem(
                "E-DATA-056",
                rows[0].file,
                rows[0].line,
                unit=rows[0].unit,
                found="fields " + ", ".join(map(shown, columns)),
                expected=f"{', '.join(fields.needed)} for the shape {shape}",
                remedy=nearest(missing[0] if missing else shape, columns),
            )
        )
    known = fields.needed + fields.optional
    used = tuple(name for name in known if columns[name])
    ignored = tuple(sorted(name for name in columns if name not in known))
    return Shape(shape, used, ignored, f"the rows have {' and '.join(fields.needed)}", text_field, label_field)


def _shape_of(row: Row, shapes: dict[str, _Fields]) -> str | None:
    """The first shape whose needed fields the row has, null or not."""
    if {"chosen", "rejected"} <= row.values.keys():
        raise error_of(Problem("E-DATA-042", row.file, row.line, field="chosen", unit=row.unit, found="fields " + ", ".join(row.values)))
    return next((name for name, fields in shapes.items() if set(fields.needed) <= row.values.keys()), None)


def _one_shape(rows: Sequence[Row], names: Sequence[str | None], columns: Counter[str], problems: Problems | None) -> str:
    counts = Counter(name for name in names if name is not None)
    if not counts:
        known = ("prompt", "completion", "messages", "conversations", "instruction", "output", "text")
        near = {name: nearest(name, known) for name in columns if name not in known}
        remedy = "; ".join(f"{name}: {word}" for name, word in near.items() if word)
        raise error_of(
            Problem(
                "E-DATA-040",
                rows[0].file,
                rows[0].line,
                unit=rows[0].unit,
                found="fields " + ", ".join(shown(name) for name in columns),
                remedy=remedy,
            )
        )
    (usual, _), *others = counts.most_common()
    if others:
        bad = Problems() if problems is None else problems
        each = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        for row, name in zip(rows, names, strict=True):
            if name not in (None, usual):
                bad.add(Problem("E-DATA-041", row.file, row.line, unit=row.unit, found=f"{name}, most rows are {usual} ({each})"))
        if problems is None:
            bad.settle()
    return usual


def samples_of(rows: Sequence[Row], shape: Shape, *, skip_bad_rows: int = 0, problems: Problems | None = None) -> list[Sample]:
    """The samples of all rows; every problem of the file is told in one DataError, up to `skip_bad_rows` bad rows are left out.

    With `problems`, bad rows are only noted there, for the caller to settle; rows that are noted already are not read.
    """
    bad = Problems(skip_bad_rows) if problems is None else problems
    noted = {(problem.file, problem.line) for problem in bad.found}
    samples: list[Sample] = []
    for number, row in enumerate(rows):
        if (row.file, row.line) in noted:
            continue
        before = len(bad.found)
        sample = READERS[shape.name](_Reader(row, number, bad), shape)
        if sample is not None and len(bad.found) == before:
            samples.append(sample)
    if problems is None:
        bad.settle()
    return samples


class _Reader:
    """One row being read, with a place to put its problems."""

    def __init__(self, row: Row, number: int, problems: Problems) -> None:
        self.row, self.number, self.problems, self.values = row, number, problems, row.values
        self.before = len(problems.found)

    def bad(self, code: str, field_name: str, found: str, remedy: str = "", expected: str = "") -> None:
        self.problems.add(Problem(code, self.row.file, self.row.line, field_name, found, expected, remedy, self.row.unit))

    def text(self, name: str, *, optional: bool = False) -> str | None:
        """The text of a field; None with a problem noted, or "" for an optional field that is not there."""
        value = self.values.get(name)
        if value is None:
            if optional:
                return ""
            self.bad("E-DATA-043", name, "null" if name in self.values else "missing")
            return None
        return self.content(value, name)

    def content(self, value: Any, name: str) -> str | None:
        """Text, or a list of text parts joined."""
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            kinds = [str(part.get("type")) for part in value]
            other = next(
                (number for number, part in enumerate(value) if not isinstance(part.get("text"), str) or part.get("type") != "text"), None
            )
            if other is None:
                return "".join(part["text"] for part in value)
            self.bad("E-DATA-047", f"{name}[{other}]", f"a part of type {shown(kinds[other])}")
            return None
        self.bad("E-DATA-044", name, f"{_kind(value)}: {shown(value)}")
        return None

    def messages(self, value: Any, name: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
        """Messages of a list, with problems noted."""
        if value is None:
            self.bad("E-DATA-043", name, "null" if name in self.values else "missing")
            return []
        if not isinstance(value, list) or not value:
            self.bad("E-DATA-046", name, "an empty list" if value == [] else f"{_kind(value)}: {shown(value)}")
            return []
        made = []
        for number, one in enumerate(value):
            if not isinstance(one, dict):
                self.bad("E-DATA-046", f"{name}[{number}]", f"{_kind(one)}: {shown(one)}")
            elif (message := self._message(one, f"{name}[{number}]", role_key, content_key)) is not None:
                made.append(message)
        return made

    def _message(self, one: dict[str, Any], at: str, role_key: str, content_key: str) -> Message | None:
        role = one.get(role_key)
        if not isinstance(role, str):
            self.bad("E-DATA-046", f"{at}.{role_key}", "missing" if role is None else f"{_kind(role)}: {shown(role)}")
            return None
        if role.lower() not in ROLE_NAMES:
            self.bad("E-DATA-045", f"{at}.{role_key}", shown(role), nearest(role.lower(), ROLE_NAMES))
            return None
        extra = {key: one[key] for key in KEPT if one.get(key) is not None}
        value = one.get(content_key)
        if value is None and extra.get("tool_calls"):
            text: str | None = ""
        elif value is None:
            self.bad("E-DATA-043", f"{at}.{content_key}", "null" if content_key in one else "missing")
            return None
        else:
            text = self.content(value, f"{at}.{content_key}")
        if text is None:
            return None
        return Message(ROLE_NAMES[role.lower()], text, extra, one.get("weight", 1) != 0)

    def tools(self) -> list[Any] | None:
        value = self.values.get("tools")
        if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
            self.bad("E-DATA-051", "tools", f"{_kind(value)}: {shown(value)}")
            return None
        return value or None

    def conversation(self, messages: list[Message], name: str, *, chat: bool = True) -> Conversation | None:
        """The conversation, when its order of roles can be trained on."""
        roles = [message.role for message in messages]
        if not roles or len(self.problems.found) > self.before:
            return None  # the order of the roles tells nothing while a message is missing
        if "system" in roles[1:]:
            at = roles.index("system", 1)
            self.bad(
                "E-DATA-050", f"{name}[{at}].role", "a second system message" if roles[0] == "system" else "a system message after others"
            )
        elif "user" not in roles:
            self.bad("E-DATA-048", name, "roles " + ", ".join(roles))
        elif roles[-1] == "user" and "assistant" in roles:
            self.bad("E-DATA-049", f"{name}[{len(roles) - 1}].role", "user")
        return Conversation(tuple(messages), self.row.place, self.number, self.tools(), chat)


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _messages(reader: _Reader, shape: Shape) -> Sample | None:
    return reader.conversation(reader.messages(reader.values.get("messages"), "messages"), "messages")


def _sharegpt(reader: _Reader, shape: Shape) -> Sample | None:
    messages = reader.messages(reader.values.get("conversations"), "conversations", "from", "value")
    system = reader.text("system", optional=True)
    if system:
        messages = [Message("system", system), *messages]
    return reader.conversation(messages, "conversations")


def _prompt_completion(reader: _Reader, shape: Shape) -> Sample | None:
    prompt, completion = reader.values.get("prompt"), reader.values.get("completion")
    chat = isinstance(prompt, list) or isinstance(completion, list)
    asked = reader.messages(prompt, "prompt") if isinstance(prompt, list) else _as_message(reader, "prompt", "user")
    answers = reader.messages(completion, "completion") if isinstance(completion, list) else _as_message(reader, "completion", "assistant")
    if chat:
        asked = [replace(message, trained=False) for message in asked]
    return reader.conversation([*asked, *answers], "prompt", chat=chat)


def _as_message(reader: _Reader, name: str, role: str) -> list[Message]:
    text = reader.text(name)
    return [] if text is None else [Message(role, text)]


def _alpaca(reader: _Reader, shape: Shape) -> Sample | None:
    instruction, given, output = reader.text("instruction"), reader.text("input", optional=True), reader.text("output")
    system = reader.text("system", optional=True)
    if instruction is None or output is None or given is None:
        return None
    messages = [Message("system", system)] if system else []
    history = reader.values.get("history") or []
    for number, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            reader.bad("E-DATA-046", f"history[{number}]", shown(pair), expected='["question", "answer"]')
            return None
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = instruction + ("\n\n" + given if given else "")
    return reader.conversation([*messages, Message("user", question), Message("assistant", output)], "instruction", chat=False)


def _tokens(reader: _Reader, shape: Shape) -> Sample | None:
    ids, labels = reader.values.get("input_ids"), reader.values.get("labels")
    if not isinstance(ids, list) or not ids or not all(type(one) is int and one >= 0 for one in ids):
        bad = next((one for one in ids if type(one) is not int or one < 0), ids) if isinstance(ids, list) else ids
        reader.bad("E-DATA-052", "input_ids", shown(bad))
        return None
    if labels is None:
        labels = list(ids)
    if not isinstance(labels, list) or len(labels) != len(ids):
        reader.bad("E-DATA-053", "labels", f"{len(labels):,} labels, {len(ids):,} tokens" if isinstance(labels, list) else shown(labels))
        return None
    wrong = next((at for at, (label, one) in enumerate(zip(labels, ids)) if label not in (-100, one)), None)
    if wrong is not None:
        reader.bad("E-DATA-053", f"labels[{wrong}]", f"{shown(labels[wrong])} at token {ids[wrong]}")
        return None
    return TokenSample(ids, labels, reader.row.place, reader.number)


def _classification(reader: _Reader, shape: Shape) -> Sample | None:
    text = reader.text(shape.text_field)
    label = reader.values.get(shape.label_field)
    if label is None:
        reader.bad("E-DATA-043", shape.label_field, "null" if shape.label_field in reader.values else "missing")
    elif type(label) not in (str, int, bool):
        reader.bad("E-DATA-054", shape.label_field, f"{_kind(label)}: {shown(label)}")
    elif text is not None:
        return ClassSample(text, str(label), reader.row.place, reader.number)
    return None


def _text(reader: _Reader, shape: Shape) -> Sample | None:
    text = reader.text(shape.text_field)
    return None if text is None else TextSample(text, reader.row.place, reader.number)


READERS: dict[str, Callable[[_Reader, Shape], Sample | None]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "tokens": _tokens,
    "classification": _classification,
    "text": _text,
}
