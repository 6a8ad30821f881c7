"""`halfbyte quickstart`: the tour."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import MOST_SEED


def quickstart(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the run; a number is added when it exists; a stopped tour goes on.")
    ] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the rows and of the training.", min=0, max=MOST_SEED)] = 0,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE.svg", help="Also draw the last screen as an SVG picture.")
    ] = None,
) -> None:
    """Teach the starter model a task it cannot do, with QLoRA, in minutes: the tour of this program."""
    from halfbyte.quickstart import tour

    tour.run(out, seed=seed, picture=picture)
