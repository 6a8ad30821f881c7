"""pydantic's list of errors -> our problems: one per setting, with what is allowed and the nearest legal name.

A field such as `auto | number` gives pydantic several errors, one for each branch; they are one problem to the user.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from halfbyte.config.base import leaves
from halfbyte.config.describe import allowed, allowed_by
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


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _close(word: str, names: Iterable[str]) -> str:
    """"did you mean lora.rank?" for the dotted names whose last word is nearest."""
    near = difflib.get_close_matches(word, {_last(name): None for name in names}, n=2, cutoff=0.6)
    found = [name for last in near for name in names if _last(name) == last]
    return f"did you mean {', '.join(found)}?" if found else ""


def _unknown(key: str, names: Mapping[str, FieldInfo]) -> Problem:
    group, word = key.rpartition(".")[0], _last(key)
    beside = [name for name in names if name.rpartition(".")[0] == group]
    known = NAMES.get(word.lower(), "")
    elsewhere = ", ".join(name for name in names if _last(name) == word) or known
    remedy = (f"that is {elsewhere} here" if elsewhere else "") or _close(word, beside) or _close(word, list(names))
    listed = "" if remedy else f"{group or 'the top level'} has {', '.join(_last(name) for name in beside)}"
    return Problem("E-CONF-020", "there is no such setting", (key,), expected=listed, remedy=remedy)


def _part(field: FieldInfo, is_entry: bool) -> tuple[Any, str]:
    """Annotation and legal values of a setting, or of one entry where the setting is a list or mapping."""
    inner = _group_of(field)
    if inner:
        return inner, f"settings below it: {', '.join(inner.model_fields)}"
    if not is_entry:
        return field.annotation, allowed(field)
    entries = get_args(field.annotation)
    entry = entries[1] if get_origin(field.annotation) is dict else entries[0]
    return entry, allowed_by(entry)


def _bad_value(key: str, field: FieldInfo, is_entry: bool, kinds: set[str], value: Any) -> Problem:
    annotation, legal = _part(field, is_entry)
    if "missing" in kinds:
        return Problem("E-CONF-021", "a setting is missing", (key,), expected=legal,
                       remedy="write `data: rows.jsonl`, or give --data rows.jsonl")  # fmt: skip
    if _group_of(field):
        return Problem("E-CONF-027", "this is a group of settings", (key,), found=_with_kind(value), expected=legal)
    if kinds & _RANGE:
        return Problem("E-CONF-023", "a setting is out of range", (key,), found=shown(value), expected=legal)
    options = list(leaves(annotation))
    words = [leaf for leaf in options if isinstance(leaf, str)]
    only_words = all(not isinstance(leaf, type) for leaf in options)
    if "literal_error" in kinds and (only_words or (isinstance(value, str) and words)):
        return Problem("E-CONF-024", "a setting has an unknown value", (key,), found=shown(value), expected=legal,
                       remedy=_nearest_word(str(value), words))  # fmt: skip
    remedy = ""
    if bool in options and str(value).lower() in _SWITCH_WORDS:
        remedy = f"write {_SWITCH_WORDS[str(value).lower()]}"
    elif str in options and isinstance(value, int | float):
        remedy = "put the value in quotes"
    elif tuple in options and isinstance(value, str):
        remedy = f"write [{value}]"
    return Problem("E-CONF-022", "a setting has the wrong type", (key,), found=_with_kind(value), expected=legal, remedy=remedy)


def _nearest_word(text: str, words: list[str]) -> str:
    if text.lower() in ("float16", "fp16", "half"):
        return "16-bit floats of this kind overflow in training; use bfloat16, or float32"
    meant = WORDS.get(text.lower(), "")
    return f"did you mean {meant}?" if meant in words else nearest(text, words)


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
            if item["type"] == "missing" and key == "data":
                key = "data.path"
            deeper = get_origin(names[key].annotation) in (dict, tuple) and len(parts) > 2
            key = f"{key}.{parts[2]}" if deeper else key
        kinds.setdefault(key, set()).add(item["type"])
        inputs.setdefault(key, item["input"])
    problems = []
    for key, found in kinds.items():
        if "extra_forbidden" in found:
            problems.append(_unknown(key, names))
            continue
        field = names.get(key) or names[key.rpartition(".")[0]]
        problems.append(_bad_value(key, field, key not in names, found, inputs[key]))
    return problems
