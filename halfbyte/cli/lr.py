"""`halfbyte lr`: the learning rate for a setting, from a few short runs."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import Data, Model
from halfbyte.cli.train import split_settings


def lr(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [key=value]...",
            show_default=False,
            help="The settings of the run the rate is for, as `halfbyte train` takes them; a rate among them is where the sweep begins.",
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    method: Annotated[str | None, typer.Option("--method", metavar="qlora|lora|full", help="What is trained.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the short runs; the same command goes on in it.")] = Path(
        "runs/lr"
    ),
    rows: Annotated[int, typer.Option("--rows", help="Rows each short run trains on, spread evenly over the data.")] = 300,
) -> None:
    """Find the learning rate: three to five short runs around the default, and the one with the lowest loss, with its reason.

    Give the rate to `halfbyte train` as optim.learning_rate. Stopped or killed, the same command goes on where it was.
    """
    from halfbyte.cli.terminal import say, table
    from halfbyte.config import load_config
    from halfbyte.studies.learning_rate import alone, line_titles
    from halfbyte.units import loss_is_per

    path, overrides = split_settings(settings or [])
    flags = {name: value for name, value in (("model", model), ("data", data), ("method", method)) if value is not None}
    config = load_config(path, overrides, flags)
    found = alone(config, out, rows, say)
    steps, seen = (f"{count:,} {word}{'' if count == 1 else 's'}" for count, word in ((found.steps, "optimizer step"), (found.rows, "row")))
    say(f"\n{config.method}, {steps} on {seen}, judged by rows that were not trained on\n")
    say(table(line_titles(loss_is_per(config.model.task)), found.lines()))
    if found.edge:
        say(f"\nnote     this is the {found.edge} rate tried: a better one may lie beyond; a sweep begins at optim.learning_rate")
    if found.caution:
        say(f"\nnote     {found.caution}")
    say(f"\nnext     halfbyte train ... optim.learning_rate={found.rate:.3g}")
