"""A settings file, then command-line overrides, then flags -> RunConfig, with every problem reported at once.

What is given later wins: default < file < `key=value` and flags; the same key given twice on the command line with two values is refused.
Of two settings that say one thing (inert.EITHER_OR) the command line's takes the place of the other one of the file.
Keys may be written with - or _.  The lines of the file are remembered, so a message says where to look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from halfbyte.config.base import Settings
from halfbyte.config.field_problems import field_problems
from halfbyte.config.inert import EITHER_OR, INERT_CODE
from halfbyte.config.problems import NOTHING_DONE, Problem, error_of
from halfbyte.config.rules import text_of
from halfbyte.config.run import SHORT_FORMS, RunConfig
from halfbyte.config.yaml_text import parse, parse_value, read_text

GROUPS = tuple(
    name for name, info in RunConfig.model_fields.items() if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
)
_Kind = TypeVar("_Kind", bound=Settings)


@dataclass
class Loaded:
    """The settings, what was read leniently (`notes`), and where each key was given (`places`)."""

    config: RunConfig
    notes: list[str]
    places: dict[str, str]


@dataclass
class _Draft:
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def _split(key: str) -> list[str]:
    """`lora.ranks.model.layers.0` -> ["lora", "ranks", "model.layers.0"], `model` -> ["model"]."""
    head, *rest = key.split(".", 2)
    names = [head.replace("-", "_")] + ([rest[0].replace("-", "_")] if rest else [])
    return names + rest[1:]


def _from_file(path: Path) -> _Draft:
    values, lines = parse(read_text(path), path.name)
    draft = _Draft()
    for key, line in lines.items():
        draft.places[".".join(_split(key))] = f"{path.name} line {line}"
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in GROUPS and isinstance(value, dict):
            value = {inner.replace("-", "_"): deep for inner, deep in value.items()}
        elif name in SHORT_FORMS and isinstance(value, str):
            draft.places[f"{name}.{SHORT_FORMS[name]}"] = draft.places[name]
            value = {SHORT_FORMS[name]: value}
        elif name in GROUPS and value is None:
            continue
        draft.values[name] = value
    return draft


def _given(overrides: Sequence[str], flags: Mapping[str, object], draft: _Draft, origin: str) -> dict[str, Any]:
    """Settings of the command line as dotted key -> value; a key with two values becomes a problem."""
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            draft.problems.append(Problem("E-CONF-025", "an override is written key=value", (origin,), found=text,
                                          expected="e.g. lora.rank=32"))  # fmt: skip
            continue
        pairs.append((key.strip(), parse_value(value, f"{origin}, {key.strip()}")))
    not_given = [key for key, value in flags.items() if value is None and ".".join(_split(key)) in GROUPS]  # as in a file
    pairs += [(key, str(value) if isinstance(value, Path) else value) for key, value in flags.items() if key not in not_given]
    given: dict[str, Any] = {}
    for key, value in pairs:
        name = ".".join(_split(key))
        inner = value if isinstance(value, dict) and name in GROUPS else None
        if name in SHORT_FORMS and isinstance(value, str):
            inner = {SHORT_FORMS[name]: value}
        for dotted, leaf in ({f"{name}.{part}": deep for part, deep in inner.items()} if inner is not None else {name: value}).items():
            if dotted in given and given[dotted] != leaf:
                draft.problems.append(Problem("E-CONF-026", "a setting is given twice with two values", (dotted,),
                                              found=f"{text_of(given[dotted])} and {text_of(leaf)}", remedy="give it once"))  # fmt: skip
            given[dotted] = leaf
    return given


def _drop_other_halves(given: Mapping[str, Any], draft: _Draft) -> None:
    """Take out of the file's settings what the command line says in the other way."""
    for pair in EITHER_OR:
        for said, other in (pair, pair[::-1]):
            group, name = other.split(".")
            values = draft.values.get(group)
            if given.get(said) is not None and other not in given and isinstance(values, dict):
                values.pop(name, None)


def _apply(given: Mapping[str, Any], draft: _Draft, origin: str) -> None:
    for dotted, value in given.items():
        *parents, name = _split(dotted)
        target: Any = draft.values
        for parent in parents:
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[name] = value
        draft.places[dotted] = origin


def _clashes_beside(values: Mapping[str, Any], bad: set[str]) -> list[Problem]:
    """The broken rules between the settings that are valid by themselves, so that one pass reports both kinds."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in GROUPS and isinstance(value, dict):
            kept[name] = {inner: part for inner, part in value.items() if f"{name}.{inner}" not in bad}
        elif name not in bad:
            kept[name] = value
    kept["data"] = {"path": "-", **kept.get("data", {})}
    clashes: list[Problem] = []
    try:
        RunConfig.model_validate(kept, context={"problems": clashes})
    except ValidationError:
        return []
    return [clash for clash in clashes if not bad.intersection(clash.keys)]


def _notes(config: RunConfig, draft: _Draft) -> list[str]:
    notes = []
    for group, values in draft.values.items():
        if group not in GROUPS or not isinstance(values, dict):
            continue
        for name, value in values.items():
            read = getattr(getattr(config, group), name)
            if isinstance(value, str) and isinstance(read, int | float):
                place = draft.places.get(f"{group}.{name}", "")
                notes.append(f'{place}, {group}.{name}: the text "{value}" was read as the number {text_of(read)}')
    return notes


def read_settings(
    path: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, object] | None = None, *, origin: str = "command line",
    unsaid: Mapping[str, Any] | None = None,
) -> Loaded:  # fmt: skip
    """Settings with their notes and places; raises one ConfigError that lists every problem.

    `overrides` are texts "lora.rank=32"; `flags` are dotted keys with values, where None is null, and for a group not given; `unsaid` are
    dotted keys with values that hold where nothing else says.
    """
    draft = _from_file(Path(path)) if path is not None else _Draft()
    given = _given(overrides, flags or {}, draft, origin)
    _drop_other_halves(given, draft)
    _apply(given, draft, origin)
    for key, value in (unsaid or {}).items():
        group, name = key.split(".")
        values = draft.values.setdefault(group, {})
        if isinstance(values, dict):
            values.setdefault(name, value)
    clashes: list[Problem] = []
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(draft.values, context={"problems": clashes})
    except ValidationError as error:
        faults = field_problems(error, RunConfig)
        draft.problems += faults
        clashes = _clashes_beside(draft.values, {".".join(key.split(".")[:2]) for fault in faults for key in fault.keys})
    draft.problems += clashes
    if config is None or draft.problems:
        raise error_of(draft.problems, draft.places)
    return Loaded(config, _notes(config, draft), draft.places)


def load_config(
    path: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, object] | None = None, *, origin: str = "command line"
) -> RunConfig:
    """The settings of a run from a file, overrides "key=value" and flags; raises one ConfigError that lists every problem.

    >>> load_config(None, ["data=rows.jsonl", "lora.rank=32"]).lora.rank
    32
    """
    return read_settings(path, overrides, flags, origin=origin).config


def without_effect(values: Mapping[str, Any]) -> list[str]:
    """Those of these settings (in groups) that do nothing beside the others; none where they are wrong, which loading them tells.

    >>> without_effect({"data": {"path": "rows.jsonl"}, "quant": {"calibration_rows": 20}})
    ['quant.calibration_rows']
    """
    problems: list[Problem] = []
    try:
        RunConfig.model_validate(values, context={"problems": problems})
    except ValidationError:
        return []
    return [problem.keys[0] for problem in problems if problem.code == INERT_CODE]


def make(kind: type[_Kind], values: Mapping[str, Any], group: str = "", nothing_done: str = NOTHING_DONE) -> _Kind:
    """One settings class from keyword values, with the same errors: make(LoraConfig, {"rank": 8}, "lora")."""
    problems: list[Problem] = []
    try:
        made = kind.model_validate(dict(values), context={"problems": problems})
    except ValidationError as error:
        raise error_of(problems + field_problems(error, kind, group), nothing_done=nothing_done) from None
    if problems:
        raise error_of(problems, nothing_done=nothing_done)
    return made
