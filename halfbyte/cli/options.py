"""Arguments that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

ModelOrRun = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model, a run folder or an adapter folder.")]
Model = Annotated[str | None, typer.Option("--model", metavar="M", help="Base: starter, a folder, a GGUF file or a Hub id.")]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Rows to train on: jsonl, json, csv or parquet.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter folder on top of MODEL.")]
Quant = Annotated[str | None, typer.Option("--quant", metavar="nf4|fp4|int8|none", help="Storage of the base; a run keeps its own.")]
Template = Annotated[str | None, typer.Option("--template", metavar="FILE.jinja", help="A chat template instead of the model's own.")]
AllowDownload = Annotated[bool, typer.Option("--allow-download", help="Fetch a Hub id that is not here yet.")]
ForceBase = Annotated[bool, typer.Option("--force-base", help="Accept an adapter that was trained on other weights.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens that make up this share.")]
MOST_SEED = 2**63 - 1
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.", min=0, max=MOST_SEED)]
