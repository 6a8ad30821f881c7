"""Files to rows that remember their file and line.

    rows.jsonl | rows.json | rows.csv | rows.tsv | rows.parquet | folder with train.jsonl | pattern data/*.jsonl | hub:owner/name

All problems of a file are found in one pass and told in one error.  Archives and compressed files are refused, no dataset script
is ever run, and a file that changes while it is read is refused.  The digest is that of the bytes read.  What a row means is the
business of `samples.py`.
"""

import glob
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.data import hub, json_rows, tables
from halfbyte.data.faults import Problem, Problems, error_of
from halfbyte.errors import nearest
from halfbyte.units import bytes_text

ARCHIVES = {".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
PARTS = {"train": ("train", "training"), "eval": ("valid", "validation", "eval", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Row:
    """One row: its fields, the name of its file, and its line (of a parquet file or hub data set: its row), counted from 1."""

    values: dict[str, Any]
    file: str
    line: int
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.file} {self.unit} {self.line:,}"


@dataclass(frozen=True)
class Rows:
    """What was read: rows, notes for the user, sha256 of the bytes."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    digest: str = ""


def read_rows(path: str | Path, *, skip_bad_rows: int = 0, max_rows: int | None = None, problems: Problems | None = None) -> Rows:
    """Read all rows of a file, folder (its training file), pattern or hub data set; raises DataError for what cannot be read.

    With `problems`, bad rows are only noted there, for the caller to settle together with what else is wrong with the file.
    """
    if str(path).startswith("hub:"):
        values, digest = hub.read(str(path), max_rows)
        found = [Row(row, str(path), number, "row") for number, row in enumerate(values, 1)]
        if not found:
            raise error_of(Problem("E-DATA-008", str(path), found="0 rows"))
        return Rows(found, [], digest)
    bad = Problems(skip_bad_rows) if problems is None else problems
    rows: list[Row] = []
    notes: list[str] = []
    digest_of_all = hashlib.sha256()
    for file in _files(path):
        left = None if max_rows is None else max_rows - len(rows)
        if left == 0:
            break
        more, said, digest = _read_file(file, bad, left)
        rows += more
        notes += said
        digest_of_all.update(digest.encode())
    if problems is None or not rows:
        notes += bad.settle()
    if not rows:
        raise error_of(Problem("E-DATA-008", str(path), found=f"no rows ({_size_text(path)})"))
    return Rows(rows, notes, digest_of_all.hexdigest())


def part_of_folder(path: str | Path, part: str) -> Path | None:
    """The file of a data folder that holds a part ("train", "eval", "test"); None when `path` is no folder or has none."""
    folder = Path(path)
    if str(path).startswith("hub:") or not folder.is_dir():
        return None
    for name in PARTS[part]:
        for ending in READERS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    return None


def _files(path: str | Path) -> list[Path]:
    """The files that a path names; refuses what is missing, unreadable, special or packed."""
    named = Path(path)
    if not os.path.lexists(named) and any(mark in str(path) for mark in "*?["):
        matched = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not matched:
            raise error_of(Problem("E-DATA-005", str(path), found="0 files"))
        return [_regular(file) for file in matched]
    try:
        if named.is_dir():
            inside = part_of_folder(named, "train")
            if inside is None:
                names = ", ".join(sorted(entry.name for entry in named.iterdir())[:10])
                raise error_of(Problem("E-DATA-004", str(path), found=names or "an empty folder"))
            named = inside
        return [_regular(named)]
    except PermissionError as refusal:
        raise error_of(Problem("E-DATA-002", str(path), found=str(refusal.strerror))) from None


def _regular(file: Path) -> Path:
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        near = _near_names(file)
        raise error_of(Problem("E-DATA-001", str(file), found="no such file", remedy=near)) from None
    except NotADirectoryError:
        raise error_of(Problem("E-DATA-001", str(file), found="a part of the path is a file")) from None
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_ISFIFO: "a pipe",
            stat.S_ISSOCK: "a socket",
            stat.S_ISCHR: "a device",
            stat.S_ISBLK: "a device",
            stat.S_ISDIR: "a folder",
        }
        raise error_of(Problem("E-DATA-003", str(file), found=next((name for test, name in kinds.items() if test(mode)), "something else")))
    ending = file.suffix.lower()
    if ending in ARCHIVES:
        raise error_of(Problem("E-DATA-007", str(file), found=f"a {ending} file"))
    if ending not in READERS:
        raise error_of(Problem("E-DATA-006", str(file), found=ending or "no ending"))
    return file


def _near_names(file: Path) -> str:
    if not file.parent.is_dir():
        return f"the folder {file.parent} does not exist either; check the path"
    return nearest(file.name, (entry.name for entry in file.parent.iterdir())) or ""


def _read_file(file: Path, problems: Problems, max_rows: int | None) -> tuple[list[Row], list[str], str]:
    """Rows and notes of one file, and the sha256 of its bytes; refuses a file that changed meanwhile."""
    try:
        before = _identity(file)
        digest = hashlib.sha256()
        with open(file, "rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
        values, notes, unit = READERS[file.suffix.lower()](file, problems, max_rows)
        after = _identity(file)
    except PermissionError as refusal:
        raise error_of(Problem("E-DATA-002", str(file), found=str(refusal.strerror))) from None
    except FileNotFoundError:
        raise error_of(Problem("E-DATA-009", str(file), found="the file is gone")) from None
    if before != after:
        raise error_of(Problem("E-DATA-009", str(file), found=f"{before[0]:,} bytes before, {after[0]:,} bytes after"))
    return [Row(row, str(file), line, unit) for line, row in values], notes, digest.hexdigest()


def _identity(file: Path) -> tuple[int, int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


def _size_text(path: str | Path) -> str:
    return bytes_text(Path(path).stat().st_size) if Path(path).is_file() else "every file is empty"


READERS: dict[str, Callable[[Path, Problems, int | None], json_rows.Read]] = {
    ".jsonl": json_rows.read_lines,
    ".json": json_rows.read_whole,
    ".csv": tables.read_csv,
    ".tsv": tables.read_tsv,
    ".parquet": tables.read_parquet,
}
