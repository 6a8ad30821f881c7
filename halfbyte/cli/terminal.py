"""What the commands share when they print: clean text, colour where there is any, simple tables.

Everything that came from a file or a model passes `redact.terminal` before it reaches the screen.
"""

import sys
import textwrap
from collections.abc import Iterable, Sequence

from halfbyte import env, redact

_TRAINED = "\x1b[30;42m"
_PLAIN = "\x1b[0m"


def colour() -> bool:
    """True when standard output is a terminal and the user did not ask for plain text."""
    return sys.stdout.isatty() and not env.no_color()


def say(text: str) -> None:
    """Print text that names files and models: no secrets, no escape sequences."""
    print(redact.terminal(redact.secrets(text)), flush=True)


def progress(text: str) -> None:
    """The same beside the result, on standard error."""
    print(redact.terminal(redact.secrets(text)), file=sys.stderr, flush=True)


def marked(pieces: Iterable[tuple[str, bool]]) -> str:
    """Text pieces as one text, trained ones coloured, or between [[ and ]] without colour."""
    start, end = (_TRAINED, _PLAIN) if colour() else ("[[", "]]")
    text = ""
    for piece, trained in pieces:
        clean = redact.terminal(piece)
        text += f"{start}{clean}{end}" if trained else clean
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the header underlined.

    >>> print(table(["op", "served by"], [["matmul_4bit", "cpu"]]))
    op           served by
    -----------  ---------
    matmul_4bit  cpu
    """
    cells = [list(header), *[[redact.terminal(str(cell)) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and (label, text) lines, long texts wrapped behind their label.

    >>> print(pairs("model", [("layers", "2"), ("width", "64")]))
    model
      layers  2
      width   64
    """
    width = max(len(label) for label, _ in rows)
    lines = [title]
    for label, text in rows:
        parts = textwrap.wrap(redact.terminal(text), 100) or [""]
        lines += [f"  {label:<{width}}  {parts[0]}", *(" " * (width + 4) + part for part in parts[1:])]
    return "\n".join(lines)
