"""One problem with the settings, and all of them together as one error.

A file with one problem gets that problem's own block; a file with several gets one block (E-CONF-001) that lists each with its line,
key, value and remedy, so that a file is repaired in one go.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import ConfigError

NOTHING_DONE = "Nothing was trained."
SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """`keys` are the dotted names of all settings involved; `found` may be empty where the keys say it."""

    code: str
    rule: str
    keys: tuple[str, ...]
    found: str = ""
    expected: str = ""
    remedy: str = ""

    def line(self, places: Mapping[str, str]) -> str:
        """The problem on one line, for the list of several."""
        where = "; ".join(place_of(key, places) for key in self.keys)
        expected = f"expected {self.expected}" if 0 < len(self.expected) < 100 else ""
        parts = [f"found {self.found}" if self.found else "", expected, self.remedy]
        return f"{where}: {self.rule} ({self.code})" + "".join(f"; {part}" for part in parts if part)


def place_of(key: str, places: Mapping[str, str]) -> str:
    """`run.yaml line 3, lora.rank`; the nearest enclosing key's line where the key itself has none, the key alone without a file."""
    parent = key
    while parent and parent not in places:
        parent = parent.rpartition(".")[0]
    if not parent:
        parent = next((name for name in places if name.startswith(f"{key}.")), "")
    return f"{places[parent]}, {key}" if parent else key


def _line_number(place: str) -> int:
    """The line in the file, for sorting; what has none comes last."""
    found = re.search(r" line ([0-9]+),", place)
    return int(found[1]) if found else 10**9


def error_of(
    problems: Sequence[Problem], places: Mapping[str, str] | None = None, nothing_done: str = NOTHING_DONE
) -> ConfigError:  # fmt: skip
    """All problems as one error."""
    places = places or {}
    if len(problems) == 1:
        one = problems[0]
        where = "\n".join(place_of(key, places) for key in one.keys)
        return ConfigError(
            one.rule, code=one.code, place=where, found=one.found, expected=one.expected, remedy=one.remedy, nothing_done=nothing_done
        )
    problems = sorted(problems, key=lambda problem: _line_number(place_of(problem.keys[0], places)))
    lines = [problem.line(places) for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return ConfigError(
        f"{len(problems)} settings cannot be used", code="E-CONF-001", found="\n".join(lines),
        remedy="docs/config.md lists every setting with its range", nothing_done=nothing_done,
    )


def report(problems: Sequence[Problem], context: Any) -> None:
    """Hand the problems to the collector in a validation context, or raise them."""
    if isinstance(context, dict) and "problems" in context:
        context["problems"].extend(problems)
    elif problems:
        raise error_of(problems)
