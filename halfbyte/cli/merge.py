"""`halfbyte merge`: an adapter folded into its base, as an ordinary 16-bit model folder."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import AllowDownload, ForceBase


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder or an adapter folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the merged model.")],
    onto: Annotated[
        str,
        typer.Option(
            "--onto",
            metavar="trained|original",
            help="trained: the base exactly as the adapter saw it, 4-bit weights written out in 16 bit; original: the base before "
            "quantization.",
        ),
    ] = "trained",
    dtype: Annotated[str, typer.Option("--dtype", metavar="bfloat16|float16|float32", help="Type of the written weights.")] = "bfloat16",
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="The base, where the folder names none at hand.")] = None,
    allow_download: AllowDownload = False,
    force_base: ForceBase = False,
) -> None:
    """Fold an adapter into its base and write a model that any program can load; never quantized again.

    Prints the largest difference between the logits of the merged and the unmerged model on real prompts.
    """
    from halfbyte.cli.terminal import say
    from halfbyte.models.source import require_folder

    require_folder(run)
    from halfbyte import api  # loads torch: a mistyped name is told before

    done = api.merge(run, out, onto=onto, dtype=dtype, model=model, allow_download=allow_download, force_base=force_base)
    say(done.text())
