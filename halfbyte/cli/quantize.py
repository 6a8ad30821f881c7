"""`halfbyte quantize`: a model folder in 4 or 8 bits, in bitsandbytes' format."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import MOST_SEED, AllowDownload, Template


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="starter, a folder, a GGUF file or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the quantized model.")],
    format: Annotated[str, typer.Option("--format", metavar="nf4|fp4|int8", help="Storage of the weights.")] = "nf4",
    blocksize: Annotated[int, typer.Option("--blocksize", help="Weights that share one scale (4-bit formats).")] = 64,
    double_quant: Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Store the scales in 8 bits too.")] = True,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="ROWS", help="Rows as for training: fit the scales to what they activate.")
    ] = None,
    start_rank: Annotated[
        int, typer.Option("--start-rank", help="With --calibrate: write the low-rank start of this rank too (0: none).", min=0)
    ] = 0,
    calibration_rows: Annotated[int, typer.Option("--calibration-rows", help="With --calibrate: rows that are read.", min=1)] = 128,
    seed: Annotated[int, typer.Option("--seed", help="With --calibrate: which rows are drawn.", min=0, max=MOST_SEED)] = 0,
    template: Template = None,
    allow_download: AllowDownload = False,
) -> None:
    """Write a quantized copy of a model, with its size and the error made; loads here and in transformers with bitsandbytes."""
    from halfbyte import api
    from halfbyte.cli.terminal import say

    made = api.quantize(
        model, out, format=format, blocksize=blocksize, double_quant=double_quant, allow_download=allow_download, calibrate=calibrate,
        start_rank=start_rank, calibration_rows=calibration_rows, seed=seed, template=template,
    )  # fmt: skip
    say(made.text())
