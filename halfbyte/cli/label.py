"""`halfbyte label`: the labels of new texts from a trained classifier."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import Adapter, AllowDownload, ForceBase, ModelOrRun, Quant


def label(
    model: ModelOrRun,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Rows with a text: jsonl, json, csv or parquet.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.jsonl", help="New file for the labelled rows.")],
    text_field: Annotated[
        str | None, typer.Option("--text-field", metavar="NAME", help="Column with the text; else that of the run, or text.")
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="TEXT", help="Put before the names of both new columns, for rows that have a label.")
    ] = "",
    adapter: Adapter = None,
    quant: Quant = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts at a time; changes the speed, not the labels.")] = 8,
    allow_download: AllowDownload = False,
    force_base: ForceBase = False,
) -> None:
    """Label texts with a classifier: each row as it was, with its label and the probability of that label, 0 to 1, as JSON lines.

    A text is read whole; an empty one, and one over what the model can see, gets null for both and is counted.
    """
    from halfbyte.models.source import require_at_hand

    require_at_hand(model, allow_download=allow_download)
    from halfbyte.cli.terminal import say  # the next one loads torch: a mistyped name is told before
    from halfbyte.export.labelled import label_to_file

    done = label_to_file(
        model, data, out, text_field=text_field, prefix=prefix, adapter=adapter, quant=quant, batch_size=batch_size,
        allow_download=allow_download, force_base=force_base,
    )  # fmt: skip
    say(done.text())
