"""`halfbyte doctor`: what this machine has, what serves which op and why, and what is missing for the rest."""

from typing import Annotated

import typer


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="Also look at a model: what it is and what it needs.")
    ] = None,
) -> None:
    """Say what this machine has, which implementation of each op serves and why, and what is missing for the rest."""
    from halfbyte.cli.checkup import machine_text, model_text, ops_text
    from halfbyte.cli.terminal import say

    say(machine_text())
    say("")
    say(ops_text())
    if model is not None:
        say("")
        say(model_text(model))
