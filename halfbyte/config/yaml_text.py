"""Text of a settings file -> plain values with the line of each key, and values -> text.

YAML as version 1.2 reads it: `1e-4` is a number, `yes` and `no` are words, dates are texts.  Kept small on purpose: no anchors, no tags, no
second document, no duplicate keys, at most 1 MB and 100,000 values; nothing of the file is ever made into an object.
Sources: https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from pathlib import Path
from typing import Any

import yaml

from halfbyte.config.base import NUMBER
from halfbyte.config.problems import NOTHING_DONE
from halfbyte.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
MAX_DEPTH = 20
_INT = re.compile(r"[-+]?[0-9]+\Z")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_SPECIAL = {".inf": float("inf"), "-.inf": float("-inf"), "+.inf": float("inf"), ".nan": float("nan")}


def _fault(code: str, rule: str, place: str, found: str = "", expected: str = "", remedy: str = "") -> ConfigError:
    return ConfigError(rule, code=code, place=place, found=found, expected=expected, remedy=remedy, nothing_done=NOTHING_DONE)


def read_text(path: Path) -> str:
    """The text of a settings file; raises ConfigError when it is missing, no plain file, too large or not UTF-8."""
    if not path.exists():
        raise _fault("E-CONF-002", "the settings file does not exist", str(path),
                     remedy="name an existing .yaml file; a single setting is written key=value")  # fmt: skip
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "neither a file nor a folder"
        raise _fault("E-CONF-003", "settings are read from a plain file", str(path), kind, remedy="name a .yaml file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise _fault("E-CONF-004", "a settings file has at most 1 MB", str(path), f"{size:,} bytes",
                     remedy="is this the data file? data goes under data.path")  # fmt: skip
    try:
        raw = path.read_bytes()
    except PermissionError:
        raise _fault("E-CONF-005", "the settings file may not be read", str(path), remedy=f"chmod u+r {path}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        code = "utf-16" if wide else "latin1"
        raise _fault("E-CONF-006", "a settings file is UTF-8 text", f"{path} byte {error.start}",
                     "UTF-16 text" if wide else f"byte 0x{raw[error.start]:02x}",
                     remedy=f"convert it with: iconv -f {code} -t utf-8 {path}") from None  # fmt: skip


def _check_events(text: str, name: str) -> None:
    """Refuse what a settings file never needs, before anything is built: anchors, tags, depth, size, tabs, a second document."""
    depth = count = documents = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = f"{name} line {event.start_mark.line + 1}"
            count += isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            documents += isinstance(event, yaml.DocumentStartEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _fault("E-CONF-007", "a settings file has no anchors and aliases (& and *)", place, str(event.anchor),
                             remedy="write the value out, or put it in quotes")  # fmt: skip
            if getattr(event, "tag", None):
                raise _fault("E-CONF-008", "a settings file has no tags (!)", place, str(event.tag), remedy="put the value in quotes")
            if depth > MAX_DEPTH or count > MAX_VALUES:
                raise _fault("E-CONF-009", "this is no settings file", place,
                             f"more than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values")  # fmt: skip
            if documents > 1:
                raise _fault("E-CONF-010", "a settings file holds one document", place, "---", remedy="keep one part of the file")
    except yaml.YAMLError as error:
        raise _syntax_fault(error, text, name) from None


def _syntax_fault(error: yaml.YAMLError, text: str, name: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        position = getattr(error, "position", 0)
        line = text[:position].count("\n") + 1
        return _fault("E-CONF-012", "a settings file has printable characters only", f"{name} line {line}",
                      f"U+{ord(text[position]):04X}" if position < len(text) else "")  # fmt: skip
    lines = text.split("\n")
    shown = lines[mark.line].rstrip("\r") if mark.line < len(lines) else ""
    place = f"{name} line {mark.line + 1}, column {mark.column + 1}"
    if "\t" in shown[: mark.column + 1]:
        return _fault("E-CONF-011", "lines are indented with spaces, not tabs", place, shown.strip()[:80],
                      remedy="replace each tab by two spaces")  # fmt: skip
    problem, opened = str(getattr(error, "problem", "")), getattr(error, "context_mark", None)
    if opened is not None and opened.line != mark.line:
        problem += f", {getattr(error, 'context', '')} that begins on line {opened.line + 1}"
    remedy = 'put a value that holds ": " in quotes' if "mapping values are not allowed" in problem else "close what is open, or use quotes"
    found = f"{shown.strip()[:80] or 'end of the file'} ({problem})"
    return _fault("E-CONF-013", "the file is not valid YAML", place, found, remedy=remedy)


def scalar(text: str) -> Any:
    """The value of an unquoted word by YAML 1.2's core schema.

    >>> scalar("1e-4"), scalar("true"), scalar("yes"), scalar("16"), scalar("")
    (0.0001, True, 'yes', 16, None)
    """
    if text in _WORDS:
        return _WORDS[text]
    if text.lower() in _SPECIAL:
        return _SPECIAL[text.lower()]
    if len(text) < 40 and _INT.match(text):
        return int(text)
    return float(text) if len(text) < 40 and NUMBER.match(text) else text


def _build(node: yaml.Node, key: str, name: str, lines: dict[str, int]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_build(part, f"{key}[{number}]", name, lines) for number, part in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _fault("E-CONF-014", "a key is a plain word", f"{name} line {line}")
        word = key_node.value
        dotted = f"{key}.{word}" if key else word
        if word in values:
            raise _fault("E-CONF-015", "a key stands twice", f"{name} line {line}, {dotted}",
                         f"first on line {lines[dotted]}, again on line {line}", remedy="keep one of the two")  # fmt: skip
        lines[dotted] = line
        values[word] = _build(value_node, dotted, name, lines)
    return values


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Values of a settings text and the line of each dotted key; raises ConfigError with file, line and column."""
    _check_events(text, name)
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    lines: dict[str, int] = {}
    values = {} if node is None else _build(node, "", name, lines)
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "a single value"
        raise _fault("E-CONF-016", "a settings file is made of `key: value` lines", name, found,
                     remedy="begin with a line such as method: qlora")  # fmt: skip
    return values, lines


def parse_value(text: str, name: str) -> Any:
    """The value of a command-line override: a word, or a [list] or {mapping} as YAML writes it."""
    if text[:1] not in ("[", "{", '"', "'"):
        return scalar(text)
    _check_events(text, name)
    return _build(yaml.compose(text, Loader=yaml.SafeLoader), "", name, {})


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this module would read as something else, so written text reads back as it was."""


def _quoted_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = "'" if not isinstance(scalar(value), str) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _short_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_Dumper.add_representer(str, _quoted_text)
def _on_one_line(dumper: _Dumper, value: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(float, _short_float)
_Dumper.add_representer(list, _on_one_line)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def dump(values: dict[str, Any]) -> str:
    """Plain values as YAML text, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
