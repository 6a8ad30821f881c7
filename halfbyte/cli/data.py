"""`halfbyte data check` and `halfbyte data show`: a data file through the eyes of the trainer."""

from pathlib import Path
from typing import Annotated

import typer

_FILE = Annotated[Path, typer.Argument(metavar="FILE", help="jsonl, json, csv or parquet.")]
_MODEL = Annotated[str, typer.Option("--model", metavar="M", help="Whose tokenizer and chat template to use.")]
_SETTINGS = Annotated[list[str] | None, typer.Argument(
    metavar="[key=value]...", show_default=False, help="Settings of the data group, e.g. max_tokens=512 train_on=last-assistant.")]
_TEMPLATE = Annotated[str | None, typer.Option("--template", metavar="FILE.jinja", help="A chat template instead of the model's own.")]


def check(file: _FILE, settings: _SETTINGS = None, model: _MODEL = "starter", template: _TEMPLATE = None) -> None:
    """Read a whole data file as training would, and say what was found; exit 2 when it cannot be trained on."""
    from halfbyte import api

    report = api.check_data(file, model=model, template=template, settings=settings or [])
    typer.echo(report.text())


def show(
    file: _FILE, settings: _SETTINGS = None, model: _MODEL = "starter", template: _TEMPLATE = None,
    rows: Annotated[int, typer.Option("--rows", help="How many rows to show.")] = 3,
) -> None:
    """Show rows as the model will see them, with the trained tokens coloured (or between [[ and ]] where there is no colour)."""
    from halfbyte import api
    from halfbyte.cli.terminal import marked

    for place, pieces in api.show_data(file, model=model, template=template, settings=settings or [], rows=rows):
        typer.echo(f"--- {place}")
        typer.echo(marked(pieces))
