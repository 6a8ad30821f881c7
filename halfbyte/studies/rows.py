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
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from halfbyte import env
from halfbyte.config import RunConfig
from halfbyte.data.load import content_hash, read_samples, split
from halfbyte.data.rows import part_of_folder
from halfbyte.errors import CheckpointError, DataError
from halfbyte.studies.runs import forgotten, read_json, write_json
from halfbyte.train import durable_files
from halfbyte.train.checkpoint import storage_error

SWEEP_HELD_OUT, FEWEST_HELD_OUT = 100, 8
GENERAL_PIECES, GENERAL_CHARS, LEAST_CHARS = 40, 800, 25


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

    Raises DataError, and CheckpointError where the data has changed since a run of the study made a step; before, it begins anew.
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
    if before is not None and (before == found or not forgotten(folder)):
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
        different = len({content_hash(sample) for sample in samples})
        equal = f"; equal rows stay together, and these {len(samples):,} are {different:,} different" if different < len(samples) else ""
        raise DataError(
            "a study needs held-out rows", code="E-DATA-410", place=data.path, found=f"0 held-out rows{equal}",
            remedy="name a file with data.eval_path, or set data.eval_rows" + (", or take the duplicates out" if equal else ""),
            nothing_done="Nothing was trained.",
        )  # fmt: skip
    return [values[sample.place] for sample in train], held_out, hashlib.sha256(digest.encode()).hexdigest()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, the file whole or not at all.  Raises StorageError.

    Nothing in the rows is changed but what JSON rows cannot hold and a column of a table can: NaN and infinity are null, integers of more
    than 64 bits are text.
    """
    content = "".join(json.dumps(_as_json(row), ensure_ascii=False, default=str) + "\n" for row in rows).encode(errors="surrogatepass")
    fresh = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        durable_files.create(fresh, content)
        durable_files.rename(fresh, path)
    except OSError as fault:
        raise storage_error(fault, path) from fault
    finally:
        fresh.unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    """
    >>> _as_json({"score": math.nan, "id": 2**70, "text": ["a", 1.5, 7]})
    {'score': None, 'id': '1180591620717411303424', 'text': ['a', 1.5, 7]}
    """
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def general_text(folder: Path, given: str | None, fits: Callable[[str], bool]) -> tuple[Path, str]:
    """(file, what it is) of the general text: the one that was given, or Python's own prose, written into the study.

    Pieces of prose are halved until each fits into what the model can see.
    """
    if given is not None:
        return env.at_home(given).absolute(), Path(given).name
    path = folder / "rows" / "general.jsonl"
    kept = [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n") if line] if path.is_file() else []
    pieces = kept or python_prose()
    while not all(map(fits, pieces)) and len(pieces[0]) >= 2 * LEAST_CHARS:
        pieces = python_prose(len(pieces[0]) // 2)
    if pieces != kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, ({"text": piece} for piece in pieces))
    return path, f"{len(pieces)} pieces of {len(pieces[0])} characters of Python's own reference (pydoc_data.topics)"


def python_prose(chars: int = GENERAL_CHARS) -> list[str]:
    """Pieces of the language reference, spread evenly over all of it."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    pieces = [text[start : start + chars] for start in range(0, len(text) - chars, chars)]
    return [pieces[number] for number in spread_evenly(pieces, GENERAL_PIECES)]
