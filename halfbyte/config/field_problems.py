"""pydantic's list of errors -> our problems: one per setting, with what is allowed and the nearest legal name.

A field such as `auto | number` gives pydantic several errors, one for each branch; they are one problem to the user.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from halfbyte.config.base import leaves
from halfbyte.config.describe import allowed
from halfbyte.config.elsewhere import NAMES, WORDS
from halfbyte.config.problems import Problem
from halfbyte.config.rules import text_of
from halfbyte.errors import nearest

_RANGE = {
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "too_short", "too_long", "string_too_short",
}  # fmt: skip
_KINDS: list[tuple[type | tuple[type, ...], str]] = [
    (bool, "a switch"), (int, "a number"), (float, "a number"), (str, "a text"), (dict, "a mapping"), ((list, tuple), "a list"),
]  # fmt: skip
_SWITCH_WORDS = {"yes": "true", "on": "true", "y": "true", "1": "true", "no": "false", "off": "false", "n": "false", "0": "false"}


def _group_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def setting_names(root: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting below a class as dotted name -> field; groups are listed too."""
    names: dict[str, FieldInfo] = {}
    for name, field in root.model_fields.items():
        dotted = f"{prefix}.{name}" if prefix else name
        names[dotted] = field
        inner = _group_of(field)
        if inner:
            names |= setting_names(inner, dotted)
    return names


def shown(value: Any) -> str:
    """A value as text on one line, cut at 80 characters, control characters made visible."""
    text = "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in text_of(value))
    return (text if len(text) <= 80 else text[:77] + "...") or '""'


def _with_kind(value: Any) -> str:
    if value is None:
        return "nothing"
    kind = next((name for types, name in _KINDS if isinstance(value, types)), type(value).__name__)
    return f"{shown(value)} ({kind})"


def _unknown(key: str, names: Mapping[str, FieldInfo]) -> Problem:
    group, _, word = key.rpartition(".")
    beside = [name for name in names if name.rpartition(".")[0] == group]
    close = nearest(key, beside)
    if not close and word.lower() in NAMES:
        close = f"that is {NAMES[word.lower()]} here"
    if not close:
        elsewhere = [name for name in names if name.rpartition(".")[2] == word]
        close = f"did you mean {', '.join(elsewhere)}?" if elsewhere else nearest(word, [name.rpartition(".")[2] for name in names])
        if close and not elsewhere:
            best = close.removeprefix("did you mean ").rstrip("?").split(", ")[0]
            close = f"did you mean {', '.join(name for name in names if name.rpartition('.')[2] == best)}?"
    return Problem("E-CONF-020", "there is no such setting", (key,), remedy=close or f"{group or 'the top level'} has: "
                   + ", ".join(name.rpartition(".")[2] for name in beside))  # fmt: skip


def _bad_value(key: str, field: FieldInfo, kinds: set[str], value: Any) -> Problem:
    inner = _group_of(field)
    if inner:
        return Problem("E-CONF-027", "this is a group of settings", (key,), found=_with_kind(value),
                       expected=f"settings below it: {', '.join(inner.model_fields)}")  # fmt: skip
    if "missing" in kinds:
        return Problem("E-CONF-021", "a setting is missing", (key,), expected=allowed(field), remedy=f"add {key}")
    words = [leaf for leaf in leaves(field.annotation) if isinstance(leaf, str)]
    options = list(leaves(field.annotation))
    if kinds & _RANGE:
        return Problem("E-CONF-023", "a setting is out of range", (key,), found=shown(value), expected=allowed(field))
    only_words = all(not isinstance(leaf, type) for leaf in options)
    if "literal_error" in kinds and (only_words or (isinstance(value, str) and words)):
        text = str(value)
        meant = WORDS.get(text.lower(), "")
        close = f"did you mean {meant}?" if meant in words else nearest(text, words)
        if text.lower() in ("float16", "fp16", "half"):
            close = "16-bit floats of this kind overflow in training; use bfloat16, or float32"
        return Problem("E-CONF-024", "a setting has an unknown value", (key,), found=shown(value), expected=allowed(field), remedy=close)
    remedy = ""
    if bool in options and str(value).lower() in _SWITCH_WORDS:
        remedy = f"write {_SWITCH_WORDS[str(value).lower()]}"
    elif options == [str] or (str in options and isinstance(value, int | float)):
        remedy = "put the value in quotes"
    elif tuple in options and isinstance(value, str):
        remedy = f"write [{value}]"
    return Problem("E-CONF-022", "a setting has the wrong type", (key,), found=_with_kind(value), expected=allowed(field), remedy=remedy)


def field_problems(error: ValidationError, root: type[BaseModel], group: str = "") -> list[Problem]:
    """One problem for each setting that pydantic refused, in the order of the settings."""
    names = setting_names(root, group)
    kinds: dict[str, set[str]] = {}
    inputs: dict[str, Any] = {}
    for item in error.errors(include_url=False, include_context=False):
        parts = ([group] if group else []) + [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            key = ".".join(parts)
        else:
            key = ".".join(parts[:2]) if ".".join(parts[:2]) in names else parts[0]
            deeper = getattr(names[key].annotation, "__origin__", None) in (dict, tuple) and len(parts) > 2
            key = f"{key}.{parts[2]}" if deeper else key
        kinds.setdefault(key, set()).add(item["type"])
        inputs.setdefault(key, item["input"])
    problems = []
    for key, found in kinds.items():
        if "extra_forbidden" in found:
            problems.append(_unknown(key, names))
            continue
        field = names.get(key) or names[key.rpartition(".")[0]]
        problems.append(_bad_value(key, field, found, inputs[key]))
    return problems
