"""A comparison for people and programs: comparison.txt, .json, .csv and .html, all from the same numbers.

Each measure is declared once, with its label, its unit and how it is written; the four files follow from that.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.pages import comparison as page
from halfbyte.pages import comparison_plots as plots
from halfbyte.pages.page import Picture, Table, clean, replace_file
from halfbyte.studies.learning_rate import Found, Point, line_titles
from halfbyte.studies.runs import write_json
from halfbyte.units import bytes_text, count_text, percent_text, seconds_text

Values = dict[str, Any]
LOSS = "{loss}"  # filled in by `lines`: nats/token, of a classifier nats/row


@dataclass(frozen=True)
class Measure:
    """A line of the table: its label with the unit, what it is written from (absent: the line's cell is -), and its columns in the CSV."""

    label: str
    key: str
    write: Callable[[Values], str]
    columns: tuple[tuple[str, str], ...]


def _one(label: str, key: str, column: str, write: Callable[[Any], str]) -> Measure:
    return Measure(label, key, lambda values: write(values[key]), ((column, key),))


def _with(values: Values, key: str, extra: str, digits: int) -> str:
    second = values.get(extra)
    return f"{values[key]:.{digits}f}" + (f" ± {second:.{digits}f}" if second is not None else "")


MEASURES: tuple[Measure, ...] = (
    _one("learning rate", "rate", "learning_rate", lambda value: f"{value:.3g}"),
    Measure("trained parameters", "trainable_params",
            lambda v: f"{count_text(v['trainable_params'])} ({percent_text(v['trainable_share'])})",
            (("trained_parameters", "trainable_params"), ("trained_share", "trainable_share"))),
    _one("optimizer steps", "steps", "steps", lambda value: f"{value:,}"),
    _one("weights in memory", "weight_bytes", "weights_in_memory_bytes", bytes_text),
    _one("peak memory of the process, largest seed", "peak_memory_bytes", "peak_memory_bytes", bytes_text),
    _one("rows in one forward pass", "micro_batch_size", "micro_batch_rows", str),
    _one("time of a run, evaluations included, mean", "seconds", "seconds", seconds_text),
    _one("speed of the steps, tokens/s, mean", "tokens_per_second", "tokens_per_second", lambda value: f"{value:,.0f}"),
    _one("calibrating the base, once for all runs", "preparation_seconds", "preparation_seconds", seconds_text),
    _one("peak memory of that", "preparation_peak_memory_bytes", "preparation_peak_memory_bytes", bytes_text),
    Measure(f"held-out loss, {LOSS}, mean ± standard deviation", "eval_loss", lambda v: _with(v, "eval_loss", "eval_loss_spread", 4),
            (("held_out_loss_nats_per_token", "eval_loss"), ("held_out_loss_standard_deviation", "eval_loss_spread"))),
    _one("held-out loss against {reference}", "against_reference", "held_out_loss_against_reference",
         lambda value: f"{100 * value:+.2f} %"),
    _one("95 % interval of that, seed against the same seed", "against_reference_interval",
         "held_out_loss_against_reference_95_percent_half_width", lambda value: f"± {100 * value:.2f} %"),
    Measure("task score, {score}, mean ± 95 % interval", "score", lambda v: _with(v, "score", "score_interval", 3),
            (("task_score", "score"), ("task_score_95_percent_half_width", "score_interval"))),
    Measure("what is delivered, on disk", "delivered", lambda v: bytes_text(v["delivered"]), (("delivered_bytes", "delivered"),)),
    _one(f"general text before, {LOSS}", "general_before", "general_text_before_nats_per_token", lambda value: f"{value:.4f}"),
    Measure(f"general text after, {LOSS}, mean ± standard deviation", "general_after",
            lambda v: _with(v, "general_after", "general_spread", 4),
            (("general_text_after_nats_per_token", "general_after"), ("general_text_after_standard_deviation", "general_spread"))),
    _one(f"forgotten: general text after - before, {LOSS}", "forgotten", "forgotten_nats_per_token", lambda value: f"{value:+.4f}"),
    Measure("steps to {target}'s last held-out loss (estimate)", "steps_to_target",
            lambda v: f"{v['steps_to_target']:.1f} of {v['steps']} ({v['steps_to_target_share']:.2f}x)",
            (("steps_to_target_estimate", "steps_to_target"), ("steps_to_target_share_estimate", "steps_to_target_share"))),
)  # fmt: skip


def write(comparison: Values, folder: Path) -> Path:
    """Write the four files, each whole or not at all; returns the page's path.  Raises StorageError."""
    write_json(folder / "comparison.json", comparison)
    replace_file(folder / "comparison.csv", csv_text(comparison).encode())
    replace_file(folder / "comparison.txt", text(comparison).encode())
    return page.write(
        folder / "comparison.html", title=title(comparison), lines=setting_lines(comparison), tables=tables(comparison),
        pictures=pictures(comparison), notes=notes(comparison),
    )  # fmt: skip


def title(comparison: Values) -> str:
    """What was compared, in a line."""
    return f"{', '.join(arm['name'] for arm in comparison['arms'])} on {Path(comparison['setting']['data']).name}"


def _filled(comparison: Values, arm: Values) -> Values:
    values = dict(arm["values"])
    values["delivered"] = values.get("adapter_bytes") or values.get("model_bytes")
    return values


def lines(comparison: Values) -> list[list[str]]:
    """The table as text: a line a measure that any setting has, first its label, then each setting's cell."""
    score = comparison["setting"]["score"]
    words = {"reference": comparison["reference"], "target": comparison["target"], "score": score and _score_words(score),
             "loss": _unit(comparison)}  # fmt: skip
    filled = [_filled(comparison, arm) for arm in comparison["arms"]]
    found = []
    for measure in MEASURES:
        cells = [measure.write(values) if values.get(measure.key) is not None else "-" for values in filled]
        if any(cell != "-" for cell in cells):
            found.append([measure.label.format(**words), *cells])
    unfinished = [arm["status"] for arm in comparison["arms"]]
    return ([["outcome", *unfinished]] if set(unfinished) != {"finished"} else []) + found


def _unit(comparison: Values) -> str:
    return f"nats/{comparison['setting']['per']}"


def _score_words(score: Values) -> str:
    scale = "0..100" if score["metric"] in ("bleu", "chrf") else "0..1"
    return f"{score['metric']} ({scale}, {score['rows']:,} rows)"


def setting_lines(comparison: Values) -> list[tuple[str, str]]:
    """What the numbers rest on."""
    at = comparison["setting"]
    seeds = at["seeds"]
    found = [
        ("model", str(at["model"])),
        *((f"setting {arm['name']}", _own_words(arm["own"])) for arm in comparison["arms"]),
        ("rows", f"{at['train_rows']:,} to train on, {at['held_out_rows']:,} held out, of {Path(at['data']).name}; the same for all"),
    ]
    words = [text for key, text in (
        ("global_batch_size", f"{at['global_batch_size']} rows a step"), ("schedule", f"schedule {at['schedule']}"),
        ("packing", f"packed into {at['max_tokens']:,} tokens" if at["packing"] else "not packed"),
    ) if at[key] is not None]  # fmt: skip
    found.append(("training", ", ".join([*words, *(["otherwise as each setting says"] if len(words) < 3 else [])])))
    found.append(("seeds", f"{len(seeds)} ({', '.join(map(str, seeds))}): order of the rows{_start_words(comparison)}, not which rows"))
    found.append(("learning rates", _sweep_words(at)))
    if at["general_text"]:
        found.append(("general text", f"{at['general_text']}; before is where this setting's training began"))
    if at["machine"]:
        found.append(("machine", f"{at['machine'].get('cpu', '?')}, {at['threads']} thread{'s' if at['threads'] != 1 else ''}"
                      + (f", {at['jobs']} runs side by side: times disturb each other" if at["jobs"] > 1 else "")))  # fmt: skip
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in at["versions"].items())))
    return found


def _start_words(comparison: Values) -> str:
    """What a seed changes beside the order of the rows, and for whom it does not."""
    adapted = [arm for arm in comparison["arms"] if arm["method"] != "full"]
    shared = [arm["name"] for arm in adapted if arm.get("shared_start", arm["values"].get("preparation_seconds") is not None)]
    if len(shared) == len(adapted):
        return " alone"
    return " and start of the adapter" + (f" (of {', '.join(shared)} the order alone: one start for all seeds)" if shared else "")


def _own_words(own: Values) -> str:
    """What one setting alone is told, as on a command line."""
    flat = [(key, value) if not isinstance(value, dict) else (f"{key}.{name}", inner)
            for key, value in own.items() for name, inner in (value.items() if isinstance(value, dict) else [("", None)])]  # fmt: skip
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in flat)


def _sweep_words(at: Values) -> str:
    if not at["sweep_rows"]:
        return "as set, not swept"
    rows = "training rows apart" if at["sweep_rows_apart"] else "held-out rows, for want of others"
    return (
        f"each setting's own best of 3 to 5, after one pass over {at['sweep_rows']:,} of the rows,"
        f" judged by {at['sweep_held_out_rows']:,} {rows}"
    )


def notes(comparison: Values) -> list[str]:
    """What a reader must know to read the table right."""
    found = [f"{arm['name']}: {arm['status']}. {arm['error']}" for arm in comparison["arms"] if arm["status"] != "finished"]
    if len(comparison["setting"]["seeds"]) == 1:
        found.append("One seed: nothing is said about the spread.")
    if comparison["target"]:
        found.append(
            f"Steps to {comparison['target']}'s last held-out loss: each seed against the same seed, on straight lines between the"
            " evaluations, so an estimate; - where a seed never comes there."
        )
    for arm in comparison["arms"]:
        if arm["sweep"] and (edge := _found(arm["sweep"]).edge):
            found.append(f"{arm['name']}: its learning rate is the {edge} of those tried; a better one may lie beyond.")
    return found + comparison["setting"].get("notes", [])


def text(comparison: Values) -> str:
    """The comparison for a terminal; labels wide, a column a setting."""
    table = [["", *(arm["name"] for arm in comparison["arms"])], *lines(comparison)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    body.insert(1, "  ".join("-" * width for width in widths))
    label = max(len(name) for name, _ in setting_lines(comparison))
    head = [f"{name:<{label}}  {words}" for name, words in setting_lines(comparison)]
    return clean("\n".join([*head, "", *body, *([""] if notes(comparison) else []), *notes(comparison)])) + "\n"


def csv_text(comparison: Values) -> str:
    """A line a setting, every number unrounded, its unit in the name of its column."""
    columns = [column for measure in MEASURES for column in measure.columns]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    unit = f"nats_per_{comparison['setting']['per']}"
    writer.writerow(["setting", "outcome", *(name.replace("nats_per_token", unit) for name, _ in columns)])
    for arm in comparison["arms"]:
        values = _filled(comparison, arm)
        cells = ["" if values.get(key) is None else repr(values[key]) for _, key in columns]
        writer.writerow([arm["name"], arm["status"], *cells])  # arms.NAME: no name is a spreadsheet's formula
    return out.getvalue()


def tables(comparison: Values) -> list[Table]:
    """The tables of the page."""
    names = [arm["name"] for arm in comparison["arms"]]
    found = [Table("The comparison", ["", *names], lines(comparison))]
    swept = [arm for arm in comparison["arms"] if arm["sweep"]]
    if swept:
        rows = [[arm["name"], *line] for arm in swept for line in _found(arm["sweep"]).lines()]
        titles = ["setting", *line_titles(comparison["setting"]["per"])]
        found.append(Table("Learning rates tried", titles, rows, _sweep_words(comparison["setting"])))
    if comparison["samples"]:
        answered = list(comparison["samples"][0]["answers"])
        rows = [[one["prompt"], one["reference"], *(one["answers"][name] for name in answered)] for one in comparison["samples"]]
        found.append(Table("Answers to held-out prompts", ["prompt", "the row's own answer", *answered], rows,
                           "Greedy answers of the first seed's run, cut at a number of tokens."))  # fmt: skip
    return found


def _found(sweep: Values) -> Found:
    return Found([Point(**point) for point in sweep["points"]], sweep["reasons"], sweep["rate"], sweep["rows"], sweep["steps"])


def pictures(comparison: Values) -> list[Picture]:
    """The plots of the page."""
    finished = [arm for arm in comparison["arms"] if arm["status"] == "finished"]
    if not finished:
        return []
    curves = {arm["name"]: [seed["curve"] for seed in arm["seeds"]] for arm in finished}
    points = {arm["name"]: (arm["values"]["peak_memory_bytes"], arm["values"]["eval_loss"], arm["values"]["eval_loss_spread"])
              for arm in finished}  # fmt: skip
    return [
        Picture("Held-out loss over the training", "Held-out loss of each setting over optimizer steps",
                plots.loss_curves(curves, _unit(comparison)),
                "Mean over the seeds; the band is from the lowest to the highest."),
        Picture("Loss against memory", "Last held-out loss of each setting against its peak memory",
                plots.loss_against_memory(points, _unit(comparison)),
                "Peak memory of the training process; the bar is one standard deviation over the seeds to either side."),
    ]  # fmt: skip
