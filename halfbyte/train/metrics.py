"""What a run tells while it runs: one record per step, handed to observers.

An observer is any object with the five methods of `Observer`.  This module has the one that is the source of truth, metrics.jsonl;
console.py shows records to a person, trackers.py sends them to services.

A step's record:  step, epoch, loss (per trained token; null when the window trained nothing), lr, grad_norm (before clipping),
clipped_norm, trained_tokens, tokens, rows (numbers of the data rows), seconds, tokens_per_second, memory_bytes.
An evaluation's:  step, eval_loss, perplexity, eval_tokens, best, seconds; of a classifier also accuracy and macro_f1, no perplexity.
A classifier's trained_tokens and eval_tokens count rows, for the loss is their mean.
A note's:  step, event.
NaN is written as NaN and infinity as Infinity, as Python's json does, never left out.

All but the last three fields of a step are equal, to the bit, in a run that was stopped and resumed.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from halfbyte.train.checkpoint import storage_error

TIME_FIELDS = ("seconds", "tokens_per_second", "memory_bytes")
"""Fields that differ between two equal runs."""


@dataclass(frozen=True)
class Header:
    """What is known before the first step: lines of (label, text) for people, `settings` for trackers, and the length of the run."""

    lines: list[tuple[str, str]]
    total_steps: int
    first_step: int
    settings: dict[str, Any] = field(default_factory=dict)


class Observer(Protocol):
    """Something that follows a run."""

    def started(self, header: Header) -> None:
        """Once, before the first step."""

    def stepped(self, record: dict[str, Any]) -> None:
        """After each step that is logged."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """After each evaluation."""

    def noted(self, text: str) -> None:
        """At something worth a line: a smaller micro-batch, a step left out, a save that failed."""

    def finished(self, summary: dict[str, Any]) -> None:
        """Once, however the run ends; `summary["status"]` says how."""


class MetricsFile:
    """metrics.jsonl, opened for appending; `offset` is its length in bytes.  Raises StorageError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise storage_error(error, path) from error
        self.offset = self._file.seek(0, os.SEEK_END)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line and hand it to the system."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.offset = self._file.tell()

    def cut(self, offset: int) -> None:
        """Forget everything after the first `offset` bytes: lines of steps that are done again."""
        self._file.flush()
        self._file.truncate(min(offset, self.offset))
        self.offset = self._file.seek(0, os.SEEK_END)

    def records(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return read(self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl up to the first line that is unfinished or, after a power cut, no JSON."""
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


class Observers:
    """Several observers as one."""

    def __init__(self, members: Iterable[Observer]) -> None:
        self.members = list(members)

    def started(self, header: Header) -> None:
        """See Observer."""
        for member in self.members:
            member.started(header)

    def stepped(self, record: dict[str, Any]) -> None:
        """See Observer."""
        for member in self.members:
            member.stepped(record)

    def evaluated(self, record: dict[str, Any]) -> None:
        """See Observer."""
        for member in self.members:
            member.evaluated(record)

    def noted(self, text: str) -> None:
        """See Observer."""
        for member in self.members:
            member.noted(text)

    def finished(self, summary: dict[str, Any]) -> None:
        """See Observer."""
        for member in self.members:
            member.finished(summary)
