"""`halfbyte compare`: full, LoRA, QLoRA or any settings side by side, measured on the user's own model and rows."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import Data, Model
from halfbyte.cli.train import split_settings
from halfbyte.evaluate.generation import METRICS

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key=value]...",
        show_default=False,
        help="Settings for all, as `halfbyte train` takes them; each goes where it has an effect. All keys: docs/config.md.",
    ),
]
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
ScoreName = Annotated[
    str | None, typer.Option("--score", metavar="NAME", help=f"With --score-rows: {', '.join(METRICS)}; rougeL unless given.")
]
ScoreRows = Annotated[int, typer.Option("--score-rows", help="Held-out rows the model answers for the task score; 0: none.")]
Longest = Annotated[int | None, typer.Option("--max-new-tokens", help="With --score-rows: longest answer; 128 unless given.")]


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
    score: ScoreName = None,
    score_rows: ScoreRows = 0,
    max_new_tokens: Longest = None,
    samples: Annotated[int, typer.Option("--samples", help="Answers of each setting shown on the page.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", help="Runs side by side; more than 1 disturbs times and speeds.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of the table.")] = False,
) -> None:
    """Train several settings on the same rows and measure what each costs and gives.

    Each setting gets its own best learning rate from a short sweep. Stopped or killed, the same command goes on where it was.
    """
    from halfbyte.cli.terminal import progress, say
    from halfbyte.errors import ConfigError
    from halfbyte.evaluate.generation import require_known
    from halfbyte.evaluate.rows import ANSWER_TOKENS
    from halfbyte.studies import comparison, comparison_files
    from halfbyte.studies.arms import METHODS, arms_of
    from halfbyte.studies.compare import Score, Study, absolute, run

    scoring = [name for name, given in (("--score", score), ("--max-new-tokens", max_new_tokens)) if given is not None]
    if scoring and score_rows == 0:
        raise ConfigError("these options belong to a task score", code="E-CONF-417", place=" and ".join(scoring), found="no --score-rows",
                          expected="--score-rows N with it", remedy=f"say how many rows are answered, or leave {' and '.join(scoring)} out",
                          nothing_done="Nothing was trained.")  # fmt: skip
    metric, longest = "rougeL" if score is None else score, ANSWER_TOKENS if max_new_tokens is None else max_new_tokens
    require_known((metric,), "--score")
    path, overrides = split_settings(settings or [])
    flags = {name: value for name, value in (("model", model), ("data", data)) if value is not None}
    named = tuple(METHODS) if methods is None and arms is None else tuple(one.strip() for one in (methods or "").split(",") if one.strip())
    study = Study(
        tuple(arms_of(path, overrides, flags, methods=named, file=arms)), seeds, sweep_rows, general,
        Score(metric, score_rows, longest) if score_rows else None, samples, jobs,
    )  # fmt: skip
    found = comparison.numbers(run(absolute(study), out, progress if as_json else say))
    page = comparison_files.write(found, out)
    if as_json:
        from json import dumps

        typer.echo(dumps(found, indent=1))
    else:
        say("\n" + comparison_files.text(found))
        say(f"page     {page}\ntable    {out / 'comparison.csv'}, {out / 'comparison.json'}")
