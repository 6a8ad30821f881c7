"""A file of texts in, the same rows with their labels out: JSON lines, one for each row, written whole or not at all.

    {"text": "Dim the hall.", "id": 7}   ->   {"text": "Dim the hall.", "id": 7, "label": "light", "probability": 0.998412}

A text that is empty or over the model's limit gets null for both, and is counted.  Values that JSON has no form for (dates, decimals of a
parquet file) are written as text; bytes are refused.
"""

import json
import os
import secrets
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import env
from halfbyte.config import DataConfig, make
from halfbyte.data.faults import Problem, error_of
from halfbyte.data.load import read_samples
from halfbyte.data.rows import Row
from halfbyte.data.samples import TextSample
from halfbyte.errors import DataError, StorageError
from halfbyte.evaluate.labelling import label_texts, longest_text, require_classifier
from halfbyte.evaluate.opened import open_model
from halfbyte.train import durable_files

COLUMNS = ("label", "probability")
NOTHING = "Nothing was written."


@dataclass(frozen=True)
class Labelled:
    """The file that was written, its rows, how many of them have each label that occurs, and how many have none because the text is empty
    or longer than `limit` tokens."""

    path: Path
    rows: int
    counts: dict[str, int]
    empty: int
    too_long: int
    limit: int

    def text(self) -> str:
        """What is printed when it is done."""
        lines = [f"written  {self.path}, {self.rows:,} rows", "labels   " + ", ".join(f"{name} {n:,}" for name, n in self.counts.items())]
        if self.empty or self.too_long:
            lines.append(f"null     {self.empty:,} rows without text, {self.too_long:,} over the model's {self.limit:,} tokens")
        return "\n".join(lines)


def require_new_file(out: Path, data: str | Path) -> None:
    """Raise StorageError unless `out` is the name of a new .jsonl file."""
    there, folder = os.path.lexists(out), next((one for one in out.absolute().parents if one.exists()), out)
    usable = folder.is_dir() and os.access(folder, os.W_OK)
    if not there and out.suffix == ".jsonl" and usable:
        return
    same = out.exists() and Path(data).exists() and out.samefile(data)
    found = "the file that the rows are read from" if same else "something is there" if there else out.suffix or "no ending"
    raise StorageError(
        "labelled rows go to a new file of JSON lines", code="E-STORE-085", place=str(out),
        found=found if usable else f"{folder}, which is no folder that this user may write to",
        expected="a name that ends in .jsonl, where nothing is yet", remedy="name another file with --out", nothing_done=NOTHING,
    )  # fmt: skip


def label_to_file(
    model: str | Path, data: str | Path, out: Path, *, text_field: str | None = None, prefix: str = "", batch_size: int = 8, **opening: Any
) -> Labelled:
    """Label each row of `data` with a classifier and write them all to `out`.

    text_field  the column with the text; that of the run's settings unless given, else `text`
    prefix      put before the names of both new columns, for rows that have a `label` already
    opening     options of `open_model`
    Raises DataError, ModelError, StorageError, ConfigError, NumericError; then nothing is written.
    """
    out = env.at_home(out)
    require_new_file(out, data)
    opened = open_model(model, **opening)
    require_classifier(opened)
    run = opened.located.config
    field = text_field or (run.data.text_field if run is not None else "text")
    rows, _, samples = read_samples(data, make(DataConfig, {"path": str(data), "text_field": field}, "data"), "text", [])
    label_key, share_key = (prefix + name for name in COLUMNS)
    bodies = [_body(row, (label_key, share_key)) for row in rows.rows]  # before the model is run: what cannot be written is told at once
    texts = [sample.text for sample in samples if isinstance(sample, TextSample)]
    found = label_texts(opened, texts, batch_size=batch_size)
    lines = []
    for body, one in zip(bodies, found, strict=True):
        new = {label_key: one and one.label, share_key: one and round(one.probability, 6)}
        lines.append(f"{body[:-1]}, {json.dumps(new, ensure_ascii=False)[1:]}\n")
    _write(out, "".join(lines).encode())
    counts = Counter(one.label for one in found if one)
    empty = sum(not text.strip() for text in texts)
    named = {name: counts[name] for name in opened.labels if counts[name]}
    return Labelled(out, len(found), named, empty, found.count(None) - empty, longest_text(opened))


def _body(row: Row, new: tuple[str, str]) -> str:
    """A row as JSON.  Raises DataError where it has a column that is to be added, or a number that JSON has not."""
    if taken := [name for name in new if name in row.values]:
        raise DataError(
            "a new column must not replace one that is there", code="E-DATA-097", place=f"{row.place}, field {taken[0]}",
            found=f"rows with {' and '.join(taken)}", expected=f"rows without {' and '.join(new)}",
            remedy="name the new columns apart with --prefix predicted_; how right the labels are is told by `halfbyte eval`",
            nothing_done=NOTHING,
        )  # fmt: skip
    try:
        return json.dumps(row.values, ensure_ascii=False, allow_nan=False, default=_as_text)
    except TypeError:
        raise DataError(
            "a row must have a form in JSON", code="E-DATA-098", place=row.place, found="a field of bytes",
            expected="texts, numbers, dates, lists", remedy="leave that column out of the file", nothing_done=NOTHING,
        ) from None  # fmt: skip
    except ValueError:
        raise error_of(Problem("E-DATA-024", row.file, row.line, unit=row.unit, found="NaN or Infinity")) from None


def _as_text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        raise TypeError
    return str(value)


def _write(out: Path, content: bytes) -> None:
    staged = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            durable_files.create(staged, content)
            require_new_file(out, staged)  # a file that came while the model was at work stays
            durable_files.rename(staged, out)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as fault:
        raise StorageError(
            "labelled rows must find room", code="E-STORE-086", place=str(out), found=f"{type(fault).__name__}: {fault.strerror or fault}",
            remedy="free some space, or name another file with --out", nothing_done=NOTHING,
        ) from fault  # fmt: skip
