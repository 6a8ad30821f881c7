"""The report of a run: one HTML file with everything in it, for a person to read and to pass on.

    run folder (config.yaml, environment.json, metrics.jsonl, run.json, samples.json, scores.json)  ->  report.html, loss.png

How foreign text is made harmless is the business of page.py.

samples.json: [{"prompt", "reference", "before", "after"}].   scores.json: {"title", "columns", "rows", "note"}; both may be absent.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.pages import plots
from halfbyte.pages.page import Table, clean, render, replace_file, shown, shown_table, write_page
from halfbyte.units import bytes_text, count_text, percent_text, seconds_text

TILES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("status", "status", str),
    ("method", "method", str),
    ("held-out loss before, nats/{per}", "first_eval_loss", lambda loss: f"{loss:.4f}"),
    ("held-out loss, best, nats/{per}", "best_eval_loss", lambda loss: f"{loss:.4f}"),
    ("held-out loss, delivered, nats/{per}", "final_eval_loss", lambda loss: f"{loss:.4f}"),
    ("label accuracy, delivered", "accuracy", percent_text),
    ("optimizer steps", "steps", str),
    ("trained {per}s", "tokens", count_text),
    ("trained parameters", "trainable_params", count_text),
    ("share of all parameters", "trainable_share", percent_text),
    ("weights in memory", "weight_bytes", bytes_text),
    ("adapter on disk", "adapter_bytes", bytes_text),
    ("peak memory", "peak_memory_bytes", bytes_text),
    ("time", "seconds", seconds_text),
)
"""(label, key of run.json, how it is written); a key that is absent or null has no tile.  {per}: what a loss is the mean of, and what a
run counts as trained."""

CLASSIFIER = re.compile(r"^  task: sequence-classification$", re.MULTILINE)
"""The line of a resolved config.yaml by which a run trained a classifier, whose loss is one of rows."""


def html(run_folder: Path) -> tuple[str, bytes]:
    """(the page, the loss plot as PNG) of a run folder; files that are absent leave their section out."""
    records = _records(run_folder / "metrics.jsonl")
    summary = _read_json(run_folder / "run.json", {})
    environment = _read_json(run_folder / "environment.json", {})
    settings = run_folder / "config.yaml"
    config = settings.read_text() if settings.is_file() else ""
    per = "row" if CLASSIFIER.search(config) else "token"
    picture = plots.loss_curves(records, per)
    page = render(
        "report.html",
        title=f"Run {shown(run_folder.resolve().name)}",
        subtitle=_subtitle(summary),
        tiles=[(label.format(per=per), shown(write(summary[key]))) for label, key, write in TILES if summary.get(key) is not None],
        plot=base64.b64encode(picture).decode(),
        tables=_tables(run_folder),
        notes=[shown(f"step {record['step']}: {record['event']}") for record in records if "event" in record],
        config=clean(config),
        environment=clean(json.dumps(environment, indent=1, ensure_ascii=False)),
    )
    return page, picture


def write(run_folder: Path) -> Path:
    """Write report.html and loss.png into a run folder, each whole or not at all; returns the page's path.  Raises StorageError."""
    run_folder = Path(run_folder)
    page, picture = html(run_folder)
    replace_file(run_folder / "loss.png", picture)
    return write_page(run_folder / "report.html", page)


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = [f"{name} {summary[key]}" for name, key in (("model", "model"), ("data", "data")) if summary.get(key)]
    return shown(", ".join(parts))


def _tables(run_folder: Path) -> list[Table]:
    tables = []
    scores = _read_json(run_folder / "scores.json", None)
    if scores:
        tables.append(shown_table(Table(scores["title"], scores["columns"], scores["rows"], scores.get("note", ""))))
    samples = _read_json(run_folder / "samples.json", [])
    if samples:
        keys = [key for key in ("prompt", "reference", "before", "after") if any(sample.get(key) is not None for sample in samples)]
        rows = [[shown(sample.get(key, "")) for key in keys] for sample in samples]
        tables.append(Table("The same held-out prompts before and after", keys, rows))
    return tables


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _read_json(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else otherwise
