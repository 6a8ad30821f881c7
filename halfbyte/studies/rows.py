"""The rows of a study, written once and the same for every run: training, held out, and for the learning rates.

    rows/train.jsonl   rows/held-out.jsonl   rows/sweep-train.jsonl   rows/sweep-held-out.jsonl   rows/general.jsonl

Held-out rows are those of data.eval_path, or the same that a training run would hold out.  The rates are chosen on training rows alone:
SWEEP rows spread evenly over them (of few rows three quarters), judged by up to a hundred of the others, so the held-out rows of the
comparison decide nothing; only where fewer than FEWEST_HELD_OUT are left do they judge the rates too, and the table says so.

General text, to see what a model forgot, is by default prose that every Python carries: the language reference in `pydoc_data.topics`
(https://docs.python.org/3/library/pydoc.html), cut into pieces of one length.  It differs a little between versions of Python, so losses
on it are compared within one study only.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from halfbyte.config import DataConfig, RunConfig, make
from halfbyte.data.load import read_samples, split
from halfbyte.data.rows import part_of_folder
from halfbyte.errors import CheckpointError, DataError
from halfbyte.studies.runs import read_json, write_json
from halfbyte.train import durable_files
from halfbyte.train.checkpoint import storage_error

SWEEP_HELD_OUT, FEWEST_HELD_OUT = 100, 8
GENERAL_PIECES, GENERAL_CHARS = 40, 800


def spread_evenly(rows: Sequence[Any], count: int) -> list[int]:
    """Numbers of `count` rows at equal distances; of all where there are no more.

    >>> spread_evenly("abcdefgh", 3)
    [0, 2, 5]
    """
    if count >= len(rows):
        return list(range(len(rows)))
    return [number * len(rows) // count for number in range(count)]


def prepare(folder: Path, config: RunConfig, *, sweep_rows: int) -> dict[str, Any]:
    """Write the rows and return what there is: counts, and sha256 of the source.  Done before, it is only checked.

    Raises DataError, and CheckpointError where the data has changed since the study began.
    """
    place = folder / "rows"
    train, held_out, digest = _read(config)
    sweep_numbers = spread_evenly(train, min(sweep_rows, max(len(train) * 3 // 4, len(train) - SWEEP_HELD_OUT)))
    taken = set(sweep_numbers)
    others = [row for number, row in enumerate(train) if number not in taken]
    apart = len(others) >= FEWEST_HELD_OUT
    judges = others if apart else held_out
    parts = {
        "train": train, "held-out": held_out, "sweep-train": [train[number] for number in sweep_numbers],
        "sweep-held-out": [judges[number] for number in spread_evenly(judges, SWEEP_HELD_OUT)],
    }  # fmt: skip
    found = {"source": config.data.path, "digest": digest, "sweep_apart": apart, **{name: len(rows) for name, rows in parts.items()}}
    before = read_json(place / "rows.json")
    if before is not None:
        if before != found:
            raise CheckpointError(
                "a study goes on only with the rows it began with", code="E-CKPT-411", place=config.data.path,
                found="the data has changed, or how many rows are taken", remedy="name another folder with --out",
                nothing_done="Nothing was trained.",
            )  # fmt: skip
        return found
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_rows(place / f"{name}.jsonl", rows)
    write_json(place / "rows.json", found)
    return found


def require_judgeable(folder: Path, config: RunConfig, general: Path | None, *, prompts: bool) -> None:
    """Raise DataError now for what only the judging after all runs would find: general text that cannot be read, rows without prompts."""
    if general is not None:
        read_samples(str(general), make(DataConfig, {"path": str(general)}, "data"), "auto", [])
    held_out = folder / "rows" / "held-out.jsonl"
    shape = read_samples(str(held_out), config.data, config.data.shape, [])[1].name
    if prompts and shape in ("text", "tokens"):
        raise DataError(
            "a task score needs rows with prompts", code="E-DATA-412", place=config.data.path, found=f"rows of the shape {shape}",
            remedy="leave --score-rows out", nothing_done="Nothing was trained.",
        )  # fmt: skip


def _read(config: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """(training rows, held-out rows, sha256 of where they come from)."""
    data, notes = config.data, list[str]()
    rows, shape, samples = read_samples(data.path, data, data.shape, notes, data.max_rows)
    source = data.eval_path or part_of_folder(data.path, "eval")
    values = {row.place: row.values for row in rows.rows}
    digest = rows.digest
    if source is None:
        train, held = split(samples, data.eval_rows)
        held_out = [values[sample.place] for sample in held]
    else:
        train = list(samples)
        other, _, judged = read_samples(source, data, shape.name, notes)
        places = {row.place: row.values for row in other.rows}
        held_out = [places[sample.place] for sample in judged]
        digest += other.digest
    if not held_out:
        raise DataError(
            "a study needs held-out rows", code="E-DATA-410", place=data.path, found="0 held-out rows",
            remedy="name a file with data.eval_path, or set data.eval_rows", nothing_done="Nothing was trained.",
        )  # fmt: skip
    return [values[sample.place] for sample in train], held_out, hashlib.sha256(digest.encode()).hexdigest()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, the file whole or not at all; nothing in the rows is changed.  Raises StorageError."""
    content = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode(errors="surrogatepass")
    fresh = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        durable_files.create(fresh, content)
        durable_files.rename(fresh, path)
    except OSError as fault:
        raise storage_error(fault, path) from fault
    finally:
        fresh.unlink(missing_ok=True)


def general_text(folder: Path, given: str | None) -> tuple[Path, str]:
    """(file, what it is) of the general text: the one that was given, or Python's own prose, written into the study."""
    if given is not None:
        return Path(given).expanduser().absolute(), Path(given).name
    path = folder / "rows" / "general.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, ({"text": piece} for piece in python_prose()))
    return path, f"{GENERAL_PIECES} pieces of {GENERAL_CHARS} characters of Python's own reference (pydoc_data.topics)"


def python_prose() -> list[str]:
    """Pieces of the language reference, spread evenly over all of it."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    pieces = [text[start : start + GENERAL_CHARS] for start in range(0, len(text) - GENERAL_CHARS, GENERAL_CHARS)]
    return [pieces[number] for number in spread_evenly(pieces, GENERAL_PIECES)]
