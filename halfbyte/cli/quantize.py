"""`halfbyte quantize`: a model folder in 4 or 8 bits, in bitsandbytes' format."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import AllowDownload


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="starter, a folder, a GGUF file or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the quantized model.")],
    format: Annotated[str, typer.Option("--format", metavar="nf4|fp4|int8", help="Storage of the weights.")] = "nf4",
    blocksize: Annotated[int, typer.Option("--blocksize", help="Weights that share one scale (4-bit formats).")] = 64,
    double_quant: Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Store the scales in 8 bits too.")] = True,
    allow_download: AllowDownload = False,
) -> None:
    """Write a quantized copy of a model, with its size and the error made; loads here and in transformers with bitsandbytes."""
    from halfbyte import api
    from halfbyte.cli.terminal import say

    made = api.quantize(model, out, format=format, blocksize=blocksize, double_quant=double_quant, allow_download=allow_download)
    say(made.text())
