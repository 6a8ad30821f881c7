"""The settings a comparison sets side by side: the four methods, or any list of named settings, each a whole RunConfig.

    full              every weight
    lora              adapters on the 16 or 32 bit base
    qlora             adapters on the NF4 base
    qlora-calibrated  adapters on an NF4 base whose scales and low-rank start were fitted on the training rows

    a file of named settings:   r8: {method: lora, lora.rank: 8}
                                r64: {method: lora, lora: {rank: 64, alpha: 128}}

What is given for all (a config file, key=value) goes into every setting it has an effect on: an adapter's rank says nothing to full
fine-tuning and is left out there.  What a named setting says itself is never left out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config import DataConfig, RunConfig, load_config
from halfbyte.config.load import GROUPS, without_effect
from halfbyte.config.rules import value_at
from halfbyte.config.yaml_text import parse, read_text
from halfbyte.errors import ConfigError, nearest

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "qlora-calibrated": {"method": "qlora", "quant": {"calibrate": True}},
}
RESTING: dict[str, tuple[str, ...]] = {"full": ("lora", "quant", "optim.lora_plus_ratio"), "lora": ("quant",)}
"""Settings given for all that say nothing to a method."""
OWN = ("out", "method")
SAME = (
    *(f"data.{name}" for name in DataConfig.model_fields if name not in ("packing", "workers")), "model.name", "model.revision",
    "model.task", "model.labels", "train.seed",
)  # fmt: skip
"""What no setting of a comparison has for itself: all that decides rows, labels and seeds."""
NAME = re.compile(r"(?!.*\.(json|yaml|log)\Z)[A-Za-z0-9][A-Za-z0-9._+-]{0,39}\Z")
"""A study puts its own NAME.json, NAME.yaml and NAME.log beside a setting's folder."""


@dataclass(frozen=True)
class Arm:
    """One setting of the comparison: its name, what makes it different, and everything it is told."""

    name: str
    own: dict[str, Any]
    config: RunConfig


def arms_of(
    path: Path | None, overrides: Sequence[str], flags: Mapping[str, object], *, methods: Sequence[str] = (), file: Path | None = None
) -> list[Arm]:
    """The arms of the methods named and of the file, in this order; `path`, `overrides` and `flags` go into all of them.

    Raises ConfigError.
    """
    for one in overrides:
        _require_open(one.partition("=")[0].strip(), one, OWN)
    own = {name: _method(name) for name in methods}
    for name, values in (_named(file) if file is not None else {}).items():
        if name in own:
            raise _fault("E-CONF-413", "each setting of a comparison has a name of its own", found=name, remedy="choose another name")
        own[name] = values
    if not own:
        raise _fault("E-CONF-414", "a comparison needs at least one setting", expected=", ".join(METHODS), remedy="see --methods")
    common = _common(path, overrides, flags, own.values())
    given = common.model_dump(exclude_unset=True)
    arms = [Arm(name, values, _whole(given, values)) for name, values in own.items()]
    for arm in arms:
        if other := [key for key in SAME if value_at(arm.config, key) != value_at(common, key)]:
            raise _fault("E-CONF-423", "model and rows are the same for all settings of a comparison", place=f"{file}, {arm.name}",
                         found=", ".join(f"{key}={value_at(arm.config, key)}" for key in other),
                         remedy="give it for all, on the command line or with a settings file")  # fmt: skip
    return arms


def _common(path: Path | None, overrides: Sequence[str], flags: Mapping[str, object], own: Iterable[Mapping[str, Any]]) -> RunConfig:
    """What is given for all, checked as settings of qlora; of one that calibrates where only this gives a key an effect."""
    flags = {**flags, "method": "qlora"}
    try:
        return load_config(path, overrides, flags)
    except ConfigError as fault:
        groups = [values.get("quant") for values in own]
        if not any(isinstance(group, Mapping) and group.get("calibrate") for group in groups):
            raise
        try:
            found = load_config(path, overrides, {**flags, "quant.calibrate": True})
        except ConfigError:
            raise fault from None
    values = found.model_dump(exclude_unset=True)
    values["quant"].pop("calibrate")
    return RunConfig.model_validate(values, context={"problems": []})


def _method(name: str) -> dict[str, Any]:
    if name not in METHODS:
        raise _fault("E-CONF-411", "a method of a comparison must be known", found=name, expected=", ".join(METHODS),
                     remedy=nearest(name, METHODS) or "other settings go into a file for --arms")  # fmt: skip
    return METHODS[name]


def _named(file: Path) -> dict[str, dict[str, Any]]:
    """{name: settings in groups} of a file; dotted keys are put into their groups."""
    values, _ = parse(read_text(file), file.name)
    found: dict[str, dict[str, Any]] = {}
    for name, settings in values.items():
        if not NAME.match(name) or not isinstance(settings, dict):
            raise _fault("E-CONF-412", "a named setting is a short name with settings under it", place=str(file),
                         found=f"{name}: {settings}", expected="r8: {method: lora, lora.rank: 8}",
                         remedy="names have letters, digits, dots and lines, at most 40; none ends in .json, .yaml or .log")  # fmt: skip
        for key in settings:
            _require_open(str(key), f"{name}: {key}", ("out",))
        found[name] = _grouped(settings)
    return found


def _require_open(key: str, found: str, closed: Sequence[str]) -> None:
    if key in closed:
        raise _fault("E-CONF-421", "a comparison chooses this itself", place=key, found=found, remedy="see --methods, --arms and --out")


def _grouped(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    >>> _grouped({"method": "lora", "lora.rank": 8, "lora": {"alpha": 16}})
    {'method': 'lora', 'lora': {'rank': 8, 'alpha': 16}}
    """
    made: dict[str, Any] = {}
    for key, value in settings.items():
        group, dot, name = key.partition(".")
        if dot and group in GROUPS:
            inner = made.setdefault(group, {})
            if not isinstance(inner, dict) or name in inner:
                raise _twice(f"{group}: {inner} and {key}: {value}")
            inner[name] = value
        elif isinstance(value, Mapping):
            if twice := sorted(set(made.get(key, {})) & set(value)):
                raise _twice(f"{key}.{twice[0]}")
            made.setdefault(key, {}).update(value)
        else:
            made[key] = value
    return made


def _twice(found: str) -> ConfigError:
    return _fault("E-CONF-420", "a setting is given once", found=found, remedy="keep one of them")


def _whole(given: Mapping[str, Any], own: Mapping[str, Any]) -> RunConfig:
    """`given` without what rests in this method, and `own` over it."""
    method = own.get("method", "qlora")
    values: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items() if key not in OWN}
    for key in RESTING.get(str(method), ()):
        group, _, name = key.partition(".")
        if name:
            values.get(group, {}).pop(name, None)
        else:
            values.pop(group, None)
    for key in without_effect(_over(values, own)):
        group, _, name = key.partition(".")
        if name not in (own.get(group) or {}):
            values.get(group, {}).pop(name, None)
    values = _over(values, own)
    return load_config(None, flags={key: value for key, value in values.items() if value != {}}, origin="the comparison")


def _over(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, **{key: {**values.get(key, {}), **value} if isinstance(value, Mapping) else value for key, value in own.items()}}


def _fault(code: str, rule: str, *, place: str = "", found: str = "", expected: str = "", remedy: str = "") -> ConfigError:
    return ConfigError(rule, code=code, place=place, found=found, expected=expected, remedy=remedy, nothing_done="Nothing was trained.")
