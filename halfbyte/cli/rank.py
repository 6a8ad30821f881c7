"""`halfbyte rank`: which rank a model needs for some rows, what rank a trained adapter uses, and an adapter of smaller rank."""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.options import AllowDownload, ForceBase, Model
from halfbyte.cli.train import split_settings

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key=value]...",
        show_default=False,
        help="Settings of the run that is planned, as `halfbyte train` takes them: targets, alpha, learning rate, epochs.",
    ),
]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Rows to train on; with --adapter, rows to judge it by.")]
Method = Annotated[str | None, typer.Option("--method", metavar="qlora|lora", help="What is trained.")]
Stages = Annotated[
    str | None, typer.Option("--stages", metavar="NAMES", help="What to measure, the cheapest first: capacity,gradient,probe unless given.")
]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="What the rows teach: reinforcement, style, instructions (unless given), knowledge."),
]
Rows = Annotated[int | None, typer.Option("--rows", metavar="N", help="Rows for capacity and gradient; 256 unless given.")]
ProbeRank = Annotated[int | None, typer.Option("--probe-rank", metavar="R", help="Rank of the probe run; 64 unless given.")]
ProbeSteps = Annotated[
    int | None, typer.Option("--probe-steps", metavar="N", help="Steps of the probe; else a tenth of the run, at least 30.")
]
Modules = Annotated[bool, typer.Option("--modules", help="Print ranks of single modules, ready for a settings file.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", metavar="RUN", help="A run or adapter folder: show what rank it uses.")]
Truncate = Annotated[int | None, typer.Option("--truncate", metavar="R", help="With --adapter: make an adapter of this rank.")]
Joint = Annotated[bool, typer.Option("--joint", help="With --truncate: the same parameters, given to the modules that need them.")]
To = Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="New folder for the truncated adapter.")]
MaxRows = Annotated[int | None, typer.Option("--max-rows", metavar="N", help="With --adapter: only the first N rows of --data.", min=1)]
NEEDED = {
    "task": ("capacity",), "rows": ("capacity", "gradient"), "probe_rank": ("probe",), "probe_steps": ("probe",), "modules": ("gradient",),
}  # fmt: skip
"""The stages an option acts on: with none of them it would do nothing."""
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def rank(
    settings: Settings = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    stages: Stages = None,
    task: Task = None,
    rows: Rows = None,
    probe_rank: ProbeRank = None,
    probe_steps: ProbeSteps = None,
    modules: Modules = False,
    adapter: Adapter = None,
    truncate: Truncate = None,
    joint: Joint = False,
    to: To = None,
    max_rows: MaxRows = None,
    allow_download: AllowDownload = False,
    force_base: ForceBase = False,
    as_json: Json = False,
) -> None:
    """Recommend a rank for a model and rows, from measurements on them; or look at a trained adapter and make it smaller.

    `halfbyte rank --model M --data F` measures in three stages and prints r / 2, r and 2 r with loss, bytes and time.
    `halfbyte rank --adapter RUN --truncate 8 --to FOLDER --data F` writes the nearest adapter of rank 8 and measures what it costs.
    """
    from json import dumps
    from logging import WARNING

    from halfbyte.cli.terminal import say
    from halfbyte.log import logger

    names = None if stages is None else tuple(name.strip() for name in stages.split(",") if name.strip())
    options = {"stages": names, "task": task, "rows": rows, "probe_rank": probe_rank, "probe_steps": probe_steps}
    asked: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    measuring = bool(asked or modules or settings) or method is not None or model is not None
    _require_fit(measuring, data, adapter, truncate, joint, to, max_rows, force_base)
    _require_stages(names, [*asked, *(["modules"] if modules else [])])
    if adapter is not None:
        text, values = _look(adapter, data, truncate, joint, to, max_rows, allow_download, force_base)
    else:
        from halfbyte.config import load_config
        from halfbyte.studies import rank_text
        from halfbyte.studies.rank import Ask, recommend

        path, overrides = split_settings(settings or [])
        flags: dict[str, object] = {"model": model, "data": data, "method": method, "model.allow_download": allow_download or None}
        config = load_config(path, overrides, {name: value for name, value in flags.items() if value is not None})
        level = logger().level
        logger().setLevel(WARNING if as_json else level)  # no progress beside numbers for a program
        try:
            found = recommend(config, Ask(**asked))
        finally:
            logger().setLevel(level)
        text, values = rank_text.recommendation_text(found, modules=modules), rank_text.recommendation_dict(found)
    if as_json:
        typer.echo(dumps(values, indent=1))  # not `say`: what looks like a secret ("tokens": 12) would be blanked
        return
    say(text)


def _require_fit(
    measuring: bool, data: str | None, adapter: Path | None, truncate: int | None, joint: bool, to: Path | None, max_rows: int | None,
    force_base: bool,
) -> None:  # fmt: skip
    """Options that have no effect together are refused."""
    from halfbyte.errors import ConfigError

    wrong = ""
    if adapter is None and (truncate is not None or to is not None or joint or max_rows is not None or force_base):
        wrong = "--truncate, --joint, --to, --max-rows and --force-base without --adapter"
    elif adapter is not None and measuring:
        wrong = "--adapter with settings, --model or what is measured on a model (--method, --stages, --task, --rows, --probe-rank ...)"
    elif truncate is None and (joint or to is not None):
        wrong = "--joint or --to without --truncate"
    elif truncate is not None and to is None:
        wrong = "--truncate without --to"
    elif max_rows is not None and data is None:
        wrong = "--max-rows without --data"
    if wrong:
        raise ConfigError(
            "these options do not go together", code="E-CONF-545", place="halfbyte rank", found=wrong,
            expected="--model M --data FILE, or --adapter RUN [--truncate R --to FOLDER] [--data FILE]",
            nothing_done="Nothing was measured.",
        )  # fmt: skip


def _require_stages(stages: tuple[str, ...] | None, asked: list[str]) -> None:
    """What belongs to a stage that is left out is refused; nothing is where all stages are taken."""
    from halfbyte.errors import ConfigError

    idle = [] if stages is None else [name for name in asked if name in NEEDED and not {*NEEDED[name]} & {*stages}]
    if idle:
        options = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ConfigError(
            "an option belongs to a stage that is measured", code="E-CONF-546", place=options, found=f"--stages {','.join(stages or ())}",
            expected="; ".join(f"--{name.replace('_', '-')} with {' or '.join(NEEDED[name])}" for name in idle),
            remedy=f"add the stage to --stages, or leave {options} out", nothing_done="Nothing was measured.",
        )  # fmt: skip


def _look(
    folder: Path, data: str | None, truncate: int | None, joint: bool, to: Path | None, max_rows: int | None, allow_download: bool,
    force_base: bool,
) -> tuple[str, dict[str, object]]:  # fmt: skip
    """Spectrum of an adapter; its truncation; what cuts cost, where rows are given."""
    from dataclasses import asdict

    from halfbyte.adapters.truncate import open_folder
    from halfbyte.studies import rank_adapter, rank_text
    from halfbyte.studies.rank_probe import powers

    whole = open_folder(folder)
    top = max(whole.ranks.values())
    found = rank_adapter.groups(whole)
    shares = {number: rank_adapter.left_out(whole, number) for number in powers(top)}
    texts = [rank_text.adapter_text(f"{folder}, rank {top}", found, shares)]
    values: dict[str, object] = {
        "adapter": str(whole.folder), "rank": top, "modules": [asdict(group) for group in found], "left_out": shares,
        "singular_values": {name: part.values.tolist() for name, part in whole.spectra.items()},
    }  # fmt: skip
    cuts = {}
    if truncate is None and data is not None:
        cuts = {f"rank {number}": whole.cut(number) for number in powers(top)[:-1]}
    if truncate is not None and to is not None:
        whole.require_new(to)
        cut = whole.cut(truncate, joint=joint)
        name = f"rank {min(truncate, top)}" + (", joint" if joint else "")
        cuts = {name: cut}
    measured = ""
    if data is not None:
        from halfbyte.evaluate.opened import open_model
        from halfbyte.evaluate.rows import loss_batches
        from halfbyte.units import loss_is_per

        opened = open_model(folder, allow_download=allow_download, force_base=force_base)
        costs = rank_adapter.costs(opened, whole, loss_batches(opened, data, batch_size=4, max_rows=max_rows), cuts)
        measured = rank_text.costs_text(costs, loss_is_per("sequence-classification" if opened.labels else "causal-lm"))
        values["costs"] = asdict(costs)
    if truncate is not None and to is not None:  # last: what cannot be measured leaves no folder behind
        whole.write(cut, to)
        texts.append(f"written: {to}, {name}, {cut.parameters} parameters, {100 * cut.left_out:.2f} % of the squared norm left out")
        values["truncated"] = {"folder": str(to), "ranks": cut.ranks, "parameters": cut.parameters, "left_out": cut.left_out}
    texts += [measured] if measured else []
    return "\n\n".join(texts), values
