"""The page of a study: one HTML file with its settings, tables and pictures, for a person to read and to pass on."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.pages.page import Picture, Table, render, shown, shown_table, write_page


def html(
    *, title: str, lines: Sequence[tuple[str, str]], tables: Sequence[Table], pictures: Sequence[Picture], notes: Sequence[str] = ()
) -> str:
    """The page; the first table stands above the pictures, the others below."""
    return render(
        "comparison.html",
        title=shown(title),
        lines=[(shown(label), shown(words)) for label, words in lines],
        first=[shown_table(table) for table in tables[:1]],
        others=[shown_table(table) for table in tables[1:]],
        pictures=list(pictures),
        notes=[shown(note) for note in notes],
    )


def write(
    path: Path, *, title: str, lines: Sequence[tuple[str, str]], tables: Sequence[Table], pictures: Sequence[Picture],
    notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write the page, whole or not at all; returns its path.  Raises StorageError."""
    return write_page(path, html(title=title, lines=lines, tables=tables, pictures=pictures, notes=notes))
