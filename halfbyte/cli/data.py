"""`halfbyte data check` and `halfbyte data show`: a data file through the eyes of the trainer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.options import Template

if TYPE_CHECKING:
    from halfbyte.data.load import TrainData

_FILE = Annotated[Path, typer.Argument(metavar="FILE", help="jsonl, json, csv or parquet.")]
_MODEL = Annotated[str, typer.Option("--model", metavar="M", help="Whose tokenizer and chat template to use.")]
_SETTINGS = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...", show_default=False, help="Settings of the data group, e.g. max_tokens=512 train_on=last-assistant."
    ),
]


def _load(file: Path, settings: list[str] | None, model: str, template: str | None) -> tuple["TrainData", Any]:
    """(the data as training would read it, the tokenizer); the words of an error are those of a look, not of a training."""
    from halfbyte.config import load_config
    from halfbyte.data.load import load_data
    from halfbyte.errors import HalfbyteError
    from halfbyte.models.load import load_tokenizer, token_limit
    from halfbyte.models.source import resolve

    overrides = [setting if setting.startswith("data.") else f"data.{setting}" for setting in settings or []]
    labelled = {"model.task": "sequence-classification"} if "data.shape=classification" in overrides else {}
    config = load_config(None, overrides, {"data.path": str(file), **labelled})
    source = resolve(model)
    tokenizer = load_tokenizer(source)
    try:
        return load_data(config.data, tokenizer, model_limit=token_limit(source), template=template), tokenizer
    except HalfbyteError as error:
        error.nothing_done = ""
        raise


def check(file: _FILE, settings: _SETTINGS = None, model: _MODEL = "starter", template: Template = None) -> None:
    """Say whether a data file can be trained on, and what is in it.

    Reads the whole file as training would; exit code 2 and one block with every problem when it cannot be trained on.
    """
    from halfbyte.cli.terminal import say

    data, _ = _load(file, settings, model, template)
    say("\n".join(f"{label + ':':<13}{text}" for label, text in _summary(data)))
    say(f"fit to train on; look at the tokens with: halfbyte data show {file}")


def _summary(data: "TrainData") -> list[tuple[str, str]]:
    """(label, text) lines about the data."""
    report, shape = data.report, data.shape
    lines = [
        (
            "shape",
            f"{shape.name}: {shape.why}; uses {', '.join(shape.used)}" + (f", ignores {', '.join(shape.ignored)}" if shape.ignored else ""),
        ),
        ("rows", f"{len(data.train):,} to train on, {len(data.eval):,} held out"),
        ("dropped", ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "none"),
        ("tokens", f"{report.tokens:,} to train on; longest row {report.longest:,} ({report.longest_place}), limit {report.max_tokens:,}"),
    ]
    if data.labels:
        lines.append(("labels", f"{len(data.labels)}: {', '.join(data.labels)}"))
    else:
        share = report.trained_tokens / max(1, report.tokens)
        lines.append(("trained", f"{report.trained_tokens:,} tokens ({100 * share:.1f} %)"))
        lines.append(("stop token", report.stop_token_text or "none"))
    return [*lines, *(("note", note) for note in data.notes)]


def show(
    file: _FILE,
    settings: _SETTINGS = None,
    model: _MODEL = "starter",
    template: Template = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show rows as the model will see them, with the trained tokens coloured.

    Where there is no colour, trained text stands between [[ and ]].
    """
    from halfbyte.cli.terminal import marked, say
    from halfbyte.data.show import segments

    data, tokenizer = _load(file, settings, model, template)
    examples = sorted([*data.train, *data.eval], key=lambda example: example.row)
    for example in examples[:rows]:
        label = "" if example.label is None else f", label {data.labels[example.label]}"
        say(f"--- {example.place}: {len(example.input_ids)} tokens{label}")
        typer.echo(marked(segments(example, tokenizer)))
