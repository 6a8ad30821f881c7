"""`halfbyte compare`: full, LoRA, QLoRA or any settings side by side, measured on the user's own model and rows."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.train import split_settings

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key=value]...",
        show_default=False,
        help="Settings for all, as `halfbyte train` takes them; each goes where it has an effect. All keys: docs/config.md.",
    ),
]
Model = Annotated[str | None, typer.Option("--model", metavar="M", help="Base: starter, a folder, a GGUF file or a Hub id.")]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Rows to train on: jsonl, json, csv or parquet.")]
Folder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the study; the same command goes on in it.")]
Methods = Annotated[
    str | None,
    typer.Option("--methods", metavar="NAMES", help="full,lora,qlora,qlora-calibrated unless --arms is given; names with commas between."),
]
Arms = Annotated[Path | None, typer.Option("--arms", metavar="FILE.yaml", help="Named settings: r8: {method: lora, lora.rank: 8}.")]
Seeds = Annotated[int, typer.Option("--seeds", help="Runs of each setting; a seed changes the order of the rows and the start.")]
SweepRows = Annotated[
    int, typer.Option("--sweep-rows", help="Rows of the short runs that find each learning rate; 0 takes optim.learning_rate.")
]
General = Annotated[
    str | None,
    typer.Option("--general", metavar="FILE", help="General text to see what was forgotten; none leaves it out. Else Python's own."),
]
ScoreName = Annotated[str, typer.Option("--score", metavar="NAME", help="exact_match, final_answer, rouge1, rouge2, rougeL, bleu or chrf.")]


def compare(
    settings: Settings = None,
    model: Model = None,
    data: Data = None,
    out: Folder = Path("runs/compare"),
    methods: Methods = None,
    arms: Arms = None,
    seeds: Seeds = 3,
    sweep_rows: SweepRows = 300,
    general: General = None,
    score: ScoreName = "rougeL",
    score_rows: Annotated[int, typer.Option("--score-rows", help="Held-out rows the model answers for the task score; 0: none.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, with --score-rows.")] = 128,
    samples: Annotated[int, typer.Option("--samples", help="Answers of each setting shown on the page.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", help="Runs side by side; more than 1 disturbs times and speeds.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of the table.")] = False,
) -> None:
    """Train several settings on the same rows and measure what each costs and gives.

    Each setting gets its own best learning rate from a short sweep. Stopped or killed, the same command goes on where it was.
    """
    from halfbyte.cli.terminal import progress, say
    from halfbyte.errors import ConfigError
    from halfbyte.evaluate.rows import METRICS
    from halfbyte.studies import comparison, comparison_files
    from halfbyte.studies.arms import METHODS, arms_of
    from halfbyte.studies.compare import Score, Study, absolute, run

    if score not in METRICS:
        raise ConfigError("a task score must be known", code="E-CONF-417", place="--score", found=score, expected=", ".join(METRICS))
    path, overrides = split_settings(settings or [])
    flags = {name: value for name, value in (("model", model), ("data", data)) if value is not None}
    named = tuple(METHODS) if methods is None and arms is None else tuple(one.strip() for one in (methods or "").split(",") if one.strip())
    study = Study(
        tuple(arms_of(path, overrides, flags, methods=named, file=arms)), seeds, sweep_rows, general,
        Score(score, score_rows, max_new_tokens) if score_rows else None, samples, jobs,
    )  # fmt: skip
    found = comparison.numbers(run(absolute(study), out, progress if as_json else say))
    page = comparison_files.write(found, out)
    if as_json:
        from json import dumps

        typer.echo(dumps(found, indent=1))
    else:
        say("\n" + comparison_files.text(found))
        say(f"page     {page}\ntable    {out / 'comparison.csv'}, {out / 'comparison.json'}")
