"""CSV, TSV and parquet files to numbered rows.

The first line of a text table names the columns; every line has as many cells, quotes are closed, and a cell may be as long as a
JSON line (16 MiB).  A parquet file brings its own types; a row number stands in for the line.
"""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.data.faults import Problem, Problems, error_of, shown
from halfbyte.data.json_rows import LINE_LIMIT, Numbered, Read, check_encoding, decode_text


def read_csv(file: Path, problems: Problems, max_rows: int | None) -> Read:
    """Rows of a comma-separated file."""
    return _read(file, problems, max_rows, ",")


def read_tsv(file: Path, problems: Problems, max_rows: int | None) -> Read:
    """Rows of a tab-separated file."""
    return _read(file, problems, max_rows, "\t")


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module's cell limit, process-wide, is raised while we read and put back."""
    before = csv.field_size_limit(LINE_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read(file: Path, problems: Problems, max_rows: int | None, delimiter: str) -> Read:
    raw = file.read_bytes()
    notes = []
    if check_encoding(file, raw[:4096]):
        raw = raw[3:]
        notes.append(f"{file} starts with a byte order mark; it was skipped")
    text = decode_text(file, 1, raw, problems)
    if text is None or not text.strip():
        return [], notes, "line"
    rows: Numbered = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    with _long_cells():
        start = 1
        try:
            header = next(reader)
            _check_header(file, header, delimiter)
            start = reader.line_num + 1
            for cells in reader:
                if max_rows is not None and len(rows) >= max_rows:
                    break
                if cells and len(cells) != len(header):
                    found = f"{len(cells)} cells, the header has {len(header)}"
                    problems.add(Problem("E-DATA-031", str(file), start, found=found, expected=f"{len(header)} cells"))
                elif cells:
                    rows.append((start, dict(zip(header, cells))))
                start = reader.line_num + 1
        except csv.Error as fault:
            if "field limit" in str(fault):
                problems.add(Problem("E-DATA-013", str(file), start, found=f"a cell of more than {LINE_LIMIT:,} bytes"))
            else:
                problems.add(Problem("E-DATA-033", str(file), start, found=f"a quote opened on this line: {fault}"))
    return rows, notes, "line"


def _check_header(file: Path, header: list[str], delimiter: str) -> None:
    others = [mark for mark in (";", "\t", "|", ",") if mark != delimiter]
    if len(header) == 1 and (used := next((mark for mark in others if mark in header[0]), None)):
        raise error_of(Problem("E-DATA-030", str(file), 1, found=f"a header separated by {shown(used)}: {shown(header[0])}"))
    twice = {name for name in header if header.count(name) > 1}
    if twice or "" in (name.strip() for name in header):
        found = f"{shown(sorted(twice)[0])} stands twice" if twice else "an empty name"
        raise error_of(Problem("E-DATA-032", str(file), 1, found=found))


def read_parquet(file: Path, problems: Problems, max_rows: int | None) -> Read:
    """Rows of a parquet file; `line` counts rows."""
    import pyarrow
    import pyarrow.parquet

    if file.stat().st_size == 0:
        return [], [], "row"
    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for group in opened.iter_batches(batch_size=4096):
                rows += group.to_pylist()
                if max_rows is not None and len(rows) >= max_rows:
                    break
    except (pyarrow.ArrowException, OSError) as fault:
        problems.add(Problem("E-DATA-034", str(file), found=shown(str(fault).splitlines()[0], 120)))
    return list(enumerate(rows[:max_rows], 1)), [], "row"
