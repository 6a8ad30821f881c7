"""`halfbyte eval`: how well a model, or a run, does on rows."""

import json
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import Adapter, AllowDownload, ForceBase, ModelOrRun, Quant, Template
from halfbyte.evaluate.generation import METRICS


def evaluate(
    model: ModelOrRun,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Rows to judge by.")],
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            metavar="NAMES",
            help=f"Also let the model answer and score it: {','.join(METRICS)}.",
        ),
    ] = "",
    adapter: Adapter = None,
    quant: Quant = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer, with --metrics; else 128.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at a time; changes the speed, not the loss.")] = 8,
    max_rows: Annotated[int | None, typer.Option("--max-rows", help="Only the first N rows.")] = None,
    template: Template = None,
    allow_download: AllowDownload = False,
    force_base: ForceBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Held-out loss and perplexity of a model on rows; a line `loss X` and, by choice, scores of its own answers.

    Of a classifier: the loss, the share of right labels and their macro F1.
    """
    from halfbyte.models.source import require_at_hand

    require_at_hand(model, allow_download=allow_download)
    from halfbyte import api  # loads torch: a mistyped name is told before

    names = tuple(name.strip() for name in metrics.split(",") if name.strip())
    result = api.evaluate(
        model,
        data,
        metrics=names,
        adapter=adapter,
        quant=quant,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_rows=max_rows,
        template=template,
        allow_download=allow_download,
        force_base=force_base,
    )
    if as_json:
        typer.echo(json.dumps(result))
        return
    for name, value in result.items():
        typer.echo(f"{name} {value:.6f}" if isinstance(value, float) else f"{name} {value}")
    per = "row" if "accuracy" in result else "scored token; tokens counts the scored ones, those that carry the loss"
    typer.echo(f"(loss in nats per {per})", err=True)  # beside the lines that programs read
