"""`halfbyte train`: settings from a file, flags and key=value pairs -> one training run."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import Data, Model


def split_settings(words: list[str]) -> tuple[Path | None, list[str]]:
    """A config file (at most one word without "=") and the key=value words.

    >>> split_settings(["run.yaml", "lora.rank=32"])
    (PosixPath('run.yaml'), ['lora.rank=32'])
    """
    from halfbyte.errors import ConfigError

    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(
            "at most one config file can be given",
            code="E-CONF-080",
            found=" ".join(files),
            expected="CONFIG.yaml key=value ...",
            remedy="write settings as key=value, e.g. lora.rank=32",
            nothing_done="Nothing was trained.",
        )
    return (Path(files[0]) if files else None), [word for word in words if "=" in word]


def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [key=value]...",
            show_default=False,
            help="A YAML file and single settings such as lora.rank=32; a setting beats the file. All keys: docs/config.md.",
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    method: Annotated[str | None, typer.Option("--method", metavar="qlora|lora|full", help="What is trained.")] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="New folder for the run.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest whole checkpoint: `halfbyte train --resume RUN`, or with the run's settings."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")] = False,
) -> None:
    """Fine-tune a model.

    These two are the same: `halfbyte train run.yaml lora.rank=32`, with model, data, method and out in the file, and
    `halfbyte train --model M --data F --method qlora --out DIR lora.rank=32`.
    `halfbyte lr` with the same words finds the learning rate first.
    """
    from halfbyte.cli.terminal import say
    from halfbyte.config import load_config, to_yaml

    path, overrides = split_settings(settings or [])
    flags = {name: value for name, value in (("model", model), ("data", data), ("method", method), ("out", out)) if value is not None}
    if resume and path is None and data is None and out is not None:
        path = Path(out)
    if resume and path is not None and path.is_dir():
        flags.setdefault("out", str(path))
        path = path / "config.yaml"
    config = load_config(path, overrides, flags)
    if dry_run:
        say(to_yaml(config).rstrip())
        return
    from halfbyte import api

    run = api.train_config(config, resume=resume)
    say(run.closing_text())
