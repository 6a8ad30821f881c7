"""A mutant: one deliberate bug of a known class, and the test that must fail on it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`find` must stand exactly once in `file`; with `replace` in its place, `test` must fail."""

    trap: str
    name: str
    file: str
    find: str
    replace: str
    test: str
