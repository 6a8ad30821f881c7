"""The closing screen of the tour: the same requests before and after, the scores, where everything is, what to type next."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from halfbyte import env
from halfbyte.pages import terminal_picture
from halfbyte.redact import terminal
from halfbyte.units import gib, seconds_text

if TYPE_CHECKING:
    from halfbyte.quickstart.tour import Outcome

LONGEST = 64
PICTURE_WIDTH = 128


def screen(outcome: "Outcome") -> Group:
    """Everything that is shown, as something rich can draw."""
    return Group(_samples(outcome), _scores(outcome), _figures(outcome), _next(outcome))


def show(outcome: "Outcome", picture: Path | None = None) -> None:
    """Print the screen; with `picture` also draw it as an SVG file."""
    console = Console(file=sys.stdout, highlight=False, no_color=env.no_color(), width=None if sys.stdout.isatty() else PICTURE_WIDTH)
    console.print(screen(outcome))
    if picture is not None:
        terminal_picture.write(picture, screen(outcome), title="halfbyte quickstart", width=PICTURE_WIDTH)
        console.print(Text(f"picture  {picture}"))


def _short(text: str) -> str:
    one_line = " ".join(terminal(text).split())
    return one_line if len(one_line) <= LONGEST else one_line[: LONGEST - 3] + "..."


def _samples(outcome: "Outcome") -> Table:
    table = Table(title="The same held-out requests, before and after", title_justify="left", title_style="bold", expand=True)
    for name, share in (("request", 3), ("before", 3), ("after", 4)):
        table.add_column(name, overflow="fold", ratio=share)
    for row in outcome.samples:
        right = row["after"].strip() == row["reference"]
        mark = Text("right  " if right else "wrong  ", style="green" if right else "red")
        table.add_row(Text(_short(row["prompt"])), Text(_short(row["before"]), style="dim"), mark + Text(_short(row["after"])))
    return table


def _scores(outcome: "Outcome") -> Table:
    found = outcome.scores()
    table = Table(title=found["title"], title_justify="left", title_style="bold")
    table.add_column(found["columns"][0])
    table.add_column(found["columns"][1], justify="right")
    for name, share in found["rows"]:
        table.add_row(name, share, style="bold green" if name == found["rows"][-1][0] else "")
    return table


def _figures(outcome: "Outcome") -> Text:
    return Text(
        f"{outcome.scores()['note']}\n\n{seconds_text(outcome.seconds)} from start to end, peak memory {gib(outcome.peak_bytes):.2f} GiB\n"
        f"adapter  {outcome.folder / 'adapter'}   (PEFT's format)\n"
        f"report   {outcome.folder / 'report.html'}   (open it in a browser)\n"
        f"rows     {outcome.folder / 'rows.jsonl'}   (what a data file looks like)"
    )


def _next(outcome: "Outcome") -> Panel:
    commands = "\n".join((
        "halfbyte data check my-rows.jsonl",
        "halfbyte train --model starter --data my-rows.jsonl --method qlora --out runs/mine",
        "halfbyte chat runs/mine",
    ))  # fmt: skip
    return Panel(Text(commands), title="next, with a file of your own", title_align="left", expand=False)
