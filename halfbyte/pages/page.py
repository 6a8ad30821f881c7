"""What all pages share: text made fit to print, tables of text, and one self-contained HTML file written whole or not at all.

Rows, prompts, answers, names and settings may come from anybody, so jinja2 escapes all of them, a content security policy forbids every
script, form and request, and the only style that may apply is named by its hash.  What looks like a secret is blanked first, and control
characters are dropped; very long texts are cut.
"""

import base64
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte.errors import StorageError
from halfbyte.redact import secrets, terminal

HERE = Path(__file__).resolve().parent
LONGEST_TEXT = 4000
OURS = (b"<!doctype html>", b"<footer>Written by Halfbyte ")
"""How a page begins, and what only a page of ours says further down (page.html)."""


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG with its heading and the words for those who do not see it."""

    title: str
    words: str
    png: bytes
    note: str = ""

    @property
    def base64(self) -> str:
        """The bytes as a page carries them."""
        return base64.b64encode(self.png).decode()


def clean(text: str) -> str:
    """Text without secrets and control characters."""
    return terminal(secrets(text))


def shown(value: object) -> str:
    """A value as text that is fit to print: no secrets, no control characters, not endless."""
    text = clean(str(value))
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + f" ... ({len(text):,} characters)"


def shown_table(table: Table) -> Table:
    """A table whose every text is fit to print."""
    return Table(shown(table.title), [shown(cell) for cell in table.columns], [[shown(cell) for cell in row] for row in table.rows],
                 shown(table.note))  # fmt: skip


def render(template: str, **values: Any) -> str:
    """A template of this folder as a page; `style`, its hash and the version are given to it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    style = (HERE / "report.css").read_text()
    templates = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    return templates.get_template(template).render(
        style=style, style_hash=style_hash(style), version=metadata.version("halfbyte"), **values
    )


def style_hash(style: str) -> str:
    """The name of a style in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def write_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all, over an earlier one of ours or an empty file; anything else there is left.  Raises StorageError."""
    if path.is_file() and path.stat().st_size and not _is_ours(path):
        raise StorageError(
            "a page is written to a new file, or over a page of Halfbyte's", code="E-STORE-084", place=str(path),
            found="a file that is no such page", remedy="name another file", nothing_done="The file is as it was.",
        )  # fmt: skip
    return replace_file(path, page.encode())


def _is_ours(path: Path) -> bool:
    begin, later = OURS
    try:
        with path.open("rb") as file:
            return file.read(len(begin)) == begin and later in file.read()
    except OSError:
        return False


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all; returns its path.  Raises StorageError."""
    fresh = path.parent / f".{path.name}.{os.getpid()}.new"  # with_name has no answer for ""
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError as fault:
        raise StorageError(
            "the report must be writable",
            code="E-STORE-080",
            place=str(path),
            found=fault.strerror or str(fault),
            remedy="free some space, check the folder's permissions or name a file; what the page shows is not lost",
        ) from fault
    finally:
        with suppress(OSError):  # a folder that is none, or gone
            fresh.unlink(missing_ok=True)
    return path
