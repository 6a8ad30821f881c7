"""`halfbyte generate`: one answer for each prompt."""

import sys
from typing import Annotated

import typer

from halfbyte.cli.options import Adapter, AllowDownload, ForceBase, MaxNewTokens, ModelOrRun, Quant, Seed, Temperature, TopP


def generate(
    model: ModelOrRun,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", show_default=False, help="What to answer; none reads standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message before each prompt.")] = None,
    adapter: Adapter = None,
    quant: Quant = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    allow_download: AllowDownload = False,
    force_base: ForceBase = False,
) -> None:
    """Answer prompts, each on its own; answers go to standard output, separated by a line of dashes."""
    from halfbyte import redact
    from halfbyte.errors import DataError
    from halfbyte.models.source import require_at_hand

    require_at_hand(model, allow_download=allow_download)
    from halfbyte import api  # loads torch: a mistyped name is told before

    wanted = prompts or [sys.stdin.read().strip()]
    if not all(wanted):
        raise DataError(
            "a prompt must not be empty",
            code="E-DATA-080",
            place="prompt" if prompts else "standard input",
            remedy='halfbyte generate MODEL "your prompt"',
            nothing_done="Nothing was generated.",
        )
    opened = api.open_model(model, adapter=adapter, quant=quant, allow_download=allow_download, force_base=force_base, writes=True)
    answers = opened.answer(
        wanted, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, raw=raw
    )
    typer.echo(f"\n{'-' * 40}\n".join(redact.terminal(answer) for answer in answers))
