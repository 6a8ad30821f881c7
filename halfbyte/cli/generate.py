"""`halfbyte generate`: one answer for each prompt."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model, a run folder or an adapter folder.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", show_default=False, help="What to answer; none reads standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message before each prompt.")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter folder on top of MODEL.")] = None,
    quant: Annotated[
        str | None, typer.Option("--quant", metavar="nf4|fp4|int8|none", help="Storage of the base; a run keeps its own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens that make up this share.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    allow_download: Annotated[bool, typer.Option("--allow-download", help="Fetch a Hub id that is not here yet.")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="Accept an adapter that was trained on other weights.")] = False,
) -> None:
    """Answer prompts, each on its own; answers go to standard output, separated by a line of dashes."""
    from halfbyte import api, redact
    from halfbyte.errors import DataError

    wanted = prompts or [sys.stdin.read().strip()]
    if not all(wanted):
        raise DataError(
            "a prompt must not be empty",
            code="E-DATA-080",
            place="prompt" if prompts else "standard input",
            remedy='halfbyte generate MODEL "your prompt"',
            nothing_done="Nothing was generated.",
        )
    opened = api.open_model(model, adapter=adapter, quant=quant, allow_download=allow_download, force_base=force_base)
    answers = opened.answer(
        wanted, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, raw=raw
    )
    typer.echo(f"\n{'-' * 40}\n".join(redact.terminal(answer) for answer in answers))
