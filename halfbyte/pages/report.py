"""The report of a run: one HTML file with everything in it, for a person to read and to pass on.

    run folder (config.yaml, environment.json, metrics.jsonl, run.json, samples.json, scores.json)  ->  report.html, loss.png

Rows, prompts, answers, names and settings may come from anybody, so jinja2 escapes all of them, a content security policy forbids every
script, form and request, and the only style that may apply is named by its hash.  What looks like a secret is blanked first, and control
characters are dropped; very long texts are cut.

samples.json: [{"prompt", "reference", "before", "after"}].   scores.json: {"title", "columns", "rows", "note"}; both may be absent.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte.errors import StorageError
from halfbyte.pages import plots
from halfbyte.redact import secrets, terminal
from halfbyte.units import bytes_text, count_text, percent_text, seconds_text

HERE = Path(__file__).resolve().parent
LONGEST_TEXT = 4000

TILES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("status", "status", str),
    ("method", "method", str),
    ("held-out loss before", "first_eval_loss", lambda loss: f"{loss:.4f}"),
    ("held-out loss, best", "best_eval_loss", lambda loss: f"{loss:.4f}"),
    ("held-out loss, delivered", "final_eval_loss", lambda loss: f"{loss:.4f}"),
    ("label accuracy, delivered", "accuracy", percent_text),
    ("optimizer steps", "steps", str),
    ("trained tokens", "tokens", count_text),
    ("trained parameters", "trainable_params", count_text),
    ("share of all parameters", "trainable_share", percent_text),
    ("weights in memory", "weight_bytes", bytes_text),
    ("adapter on disk", "adapter_bytes", bytes_text),
    ("peak memory", "peak_memory_bytes", bytes_text),
    ("time", "seconds", seconds_text),
)
"""(label, key of run.json, how it is written); a key that is absent or null has no tile."""


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def clean(text: str) -> str:
    """Text without secrets and control characters."""
    return terminal(secrets(text))


def shown(value: object) -> str:
    """A value as text that is fit to print: no secrets, no control characters, not endless."""
    text = clean(str(value))
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + f" ... ({len(text):,} characters)"


def html(run_folder: Path) -> tuple[str, bytes]:
    """(the page, the loss plot as PNG) of a run folder; files that are absent leave their section out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    records = _records(run_folder / "metrics.jsonl")
    summary = _read_json(run_folder / "run.json", {})
    environment = _read_json(run_folder / "environment.json", {})
    picture = plots.loss_curves(records)
    style = (HERE / "report.css").read_text()
    templates = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    config = run_folder / "config.yaml"
    page = templates.get_template("report.html").render(
        title=f"Run {shown(run_folder.resolve().name)}",
        subtitle=_subtitle(summary),
        style=style,
        style_hash=_style_hash(style),
        tiles=[(label, shown(write(summary[key]))) for label, key, write in TILES if summary.get(key) is not None],
        plot=base64.b64encode(picture).decode(),
        tables=_tables(run_folder),
        notes=[shown(f"step {record['step']}: {record['event']}") for record in records if "event" in record],
        config=clean(config.read_text()) if config.is_file() else "",
        environment=clean(json.dumps(environment, indent=1, ensure_ascii=False)),
        version=metadata.version("halfbyte"),
    )
    return page, picture


def write(run_folder: Path) -> Path:
    """Write report.html and loss.png into a run folder, each whole or not at all; returns the page's path.  Raises StorageError."""
    run_folder = Path(run_folder)
    page, picture = html(run_folder)
    _replace(run_folder / "loss.png", picture)
    return _replace(run_folder / "report.html", page.encode())


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = [f"{name} {summary[key]}" for name, key in (("model", "model"), ("data", "data")) if summary.get(key)]
    return shown(", ".join(parts))


def _tables(run_folder: Path) -> list[Table]:
    tables = []
    scores = _read_json(run_folder / "scores.json", None)
    if scores:
        rows = [[shown(cell) for cell in row] for row in scores["rows"]]
        tables.append(Table(shown(scores["title"]), [shown(cell) for cell in scores["columns"]], rows, shown(scores.get("note", ""))))
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


def _style_hash(style: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _replace(path: Path, content: bytes) -> Path:
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError as fault:
        raise StorageError(
            "the report must be writable",
            code="E-STORE-080",
            place=str(path),
            found=fault.strerror or str(fault),
            remedy="free some space or check the folder's permissions; the run itself is complete",
        ) from fault
    return path
