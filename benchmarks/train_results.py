"""From single runs of the training benchmark to its figures: rates, ratios of one round, agreement of losses, table and plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Run = Mapping[str, Any]

WARMUP = 2
"""Steps at the start of a run that are not timed: pages, threads and caches settle."""

FIRST_LOSS = {"fp32": 1e-4, "low": 1e-2}
"""Largest relative difference of the first step's loss, before any update: rounding of one forward pass."""
MEAN_LOSS = {"fp32": 5e-3, "low": 3e-2}
"""Largest mean relative difference over the steps: at rate 1e-3 Adam's first steps turn rounding into whole steps of small gradients."""

BARS: tuple[tuple[str, str, str, str, float | None], ...] = (
    ("tokens/s", "train-nf4", "peft-nf4", ">=", 1.8),
    ("tokens/s", "loop-nf4", "peft-nf4", ">=", 1.8),
    ("tokens/s", "train-nf4", "trl-nf4", ">=", 1.8),
    ("tokens/s", "loop-nf4", "trl-nf4", ">=", 1.8),
    ("tokens/s", "train-bf16", "peft-bf16", ">=", 1.6),
    ("tokens/s", "loop-bf16", "peft-bf16", ">=", 1.6),
    ("tokens/s", "train-bf16", "trl-bf16", ">=", 1.6),
    ("tokens/s", "train-bf16", "peft-fp32", ">=", 2.5),
    ("tokens/s", "loop-bf16", "peft-fp32", ">=", 2.5),
    ("tokens/s", "train-fp32", "peft-fp32", ">=", None),
    ("tokens/s", "train-fp32", "trl-fp32", ">=", None),
    ("peak RSS", "train-nf4", "peft-nf4", "<=", 0.35),
    ("peak RSS", "loop-nf4", "peft-nf4", "<=", 0.35),
    ("peak RSS", "train-nf4", "trl-nf4", "<=", 0.7),
    ("peak RSS", "loop-nf4", "trl-nf4", "<=", 0.7),
)
"""(what, ours, peer, direction, bar); a bar of None is reported only."""


def tokens_per_second(run: Run, tokens: Sequence[int]) -> float:
    """Median over the steps after the warm-up of tokens without padding by seconds; all but the first of a run too short for it."""
    skipped = WARMUP if len(run["seconds"]) > WARMUP else len(run["seconds"]) - 1
    return statistics.median(count / second for count, second in list(zip(tokens, run["seconds"]))[skipped:])


def figures(runs: Sequence[Run], tokens: Sequence[int]) -> dict[str, Any]:
    """One arm over its runs: medians, and each run's rate."""
    rates = [tokens_per_second(run, tokens) for run in runs]

    def warm(name: str) -> list[Any]:
        return [value for run in runs for value in run[name][WARMUP:] or run[name][-1:]]

    return {
        "tokens_per_second": round(statistics.median(rates), 1), "all_tokens_per_second": [round(rate, 1) for rate in rates],
        "step_seconds": round(statistics.median(warm("seconds")), 3), "fastest_step_seconds": round(min(warm("seconds")), 3),
        "processor_seconds_per_step": round(statistics.median(warm("processor_seconds")), 3),
        "peak_rss_bytes": int(statistics.median(run["peak_rss_bytes"] for run in runs)),
        "peak_rss_anon_bytes": int(statistics.median(run["peak_rss_anon_bytes"] for run in runs)),
        "startup_seconds": round(statistics.median(run["startup_seconds"] for run in runs), 2),
        "minor_faults_per_step": int(statistics.median(warm("minor_faults"))),
        "losses": [round(loss, 5) for loss in runs[0]["losses"]], "notes": runs[0]["notes"],
        **({"peak_device_bytes": max(run["peak_device_bytes"] for run in runs)} if "peak_device_bytes" in runs[0] else {}),
    }  # fmt: skip


def ratios(by_round: Sequence[Mapping[str, Run]], tokens: Sequence[int], bars: Sequence[tuple[Any, ...]] = BARS) -> list[dict[str, Any]]:
    """Each line of `bars`: the median over rounds of ours by the peer's, both of the same round."""
    made = []
    for what, ours, peer, direction, bar in bars:
        pairs = [(found[ours], found[peer]) for found in by_round if ours in found and peer in found]
        if not pairs:
            continue
        if what == "tokens/s":
            each = [tokens_per_second(one, tokens) / tokens_per_second(other, tokens) for one, other in pairs]
        else:
            each = [one["peak_rss_bytes"] / other["peak_rss_bytes"] for one, other in pairs]
        value = statistics.median(each)
        reached = None if bar is None else value >= bar if direction == ">=" else value <= bar
        made.append(
            {"what": what, "ours": ours, "peer": peer, "ratio": round(value, 3), "rounds": [round(one, 3) for one in each],
             "bar": None if bar is None else f"{direction} {bar}", "reached": reached}
        )  # fmt: skip
    return made


def _grade(*arms: str) -> str:
    """fp32 where both compute in it; TRL's defaults compute under bf16 autocast whatever the base is."""
    return "fp32" if all(arm.endswith("fp32") and not arm.startswith("trl") for arm in arms) else "low"


def agreement(losses: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Every arm's losses against those of PEFT in the same precision."""
    made = []
    for arm, found in losses.items():
        peer = "peft-" + arm.split("-")[1]
        if arm == peer or peer not in losses:
            continue
        apart = [abs(one - other) / abs(other) for one, other in zip(found, losses[peer])]
        grade = _grade(arm, peer)
        mean = statistics.mean(apart)
        made.append(
            {"arm": arm, "against": peer, "first": round(apart[0], 6), "mean": round(mean, 6), "first_at_most": FIRST_LOSS[grade],
             "mean_at_most": MEAN_LOSS[grade], "agree": apart[0] <= FIRST_LOSS[grade] and mean <= MEAN_LOSS[grade]}
        )  # fmt: skip
    return made


def table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as text."""
    lines = ["arm          tokens/s  step s fastest  proc s peak GiB anon GiB start s faults/step  last loss"]
    for arm, found in arms.items():
        memory = f"{found['peak_rss_bytes'] / 2**30:>9.2f}{found['peak_rss_anon_bytes'] / 2**30:>9.2f}"
        lines.append(
            f"{arm:<12}{found['tokens_per_second']:>9.1f}{found['step_seconds']:>8.2f}{found['fastest_step_seconds']:>8.2f}"
            f"{found['processor_seconds_per_step']:>8.2f}{memory}{found['startup_seconds']:>8.1f}"
            f"{found['minor_faults_per_step']:>12,}  {found['losses'][-1]:.4f}"
        )
    return "\n".join(lines)


def lines_of(found: Sequence[Mapping[str, Any]]) -> str:
    """The ratios as text."""
    words = {True: "reached", False: "NOT REACHED", None: "reported"}
    made = []
    for one in found:
        pair = f"{one['what']:<9}{one['ours']:>11} / {one['peer']:<10}"
        made.append(f"{pair}{one['ratio']:>7.2f}  {one['bar'] or '':<8}{words[one['reached']]}")
    return "\n".join(made)


NAMES = {"train": "halfbyte train", "loop": "halfbyte, own loop", "peft": "PEFT", "trl": "TRL defaults"}
COLOURS = {"train": "#1f5fa8", "loop": "#5b8fca", "peft": "#b9b3a8", "trl": "#d8d2c6"}


def plot(arms: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Two panels of bars, tokens/s and peak memory, an arm a row; the file's suffix says its format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = [f"{kind}-{precision}" for precision in ("nf4", "bf16", "fp32") for kind in NAMES if f"{kind}-{precision}" in arms]
    figure = Figure(figsize=(9, 0.8 + 0.34 * len(order)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    places: list[float] = []
    for number, arm in enumerate(order):
        gap = 0.6 if number and order[number - 1].split("-")[1] != arm.split("-")[1] else 0.0
        places.append((places[-1] + 1 if places else 0.0) + gap)
    device = any("peak_device_bytes" in arms[arm] for arm in order)
    memory = "peak_device_bytes" if device else "peak_rss_bytes"
    panels = (("tokens/s", lambda found: found["tokens_per_second"]), ("peak memory, GiB", lambda found: found[memory] / 2**30))
    for axes, (name, value) in zip(figure.subplots(1, 2, sharey=True), panels):
        values = [value(arms[arm]) for arm in order]
        bars = axes.barh(places, values, color=[COLOURS[arm.split("-")[0]] for arm in order], height=0.8)
        axes.bar_label(bars, [f"{one:,.0f}" if one >= 20 else f"{one:.1f}" for one in values], padding=3, fontsize=8)
        axes.set_xlim(0, max(values) * 1.15)
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(places, [f"{arm.split('-')[1]}  {NAMES[arm.split('-')[0]]}" for arm in order], fontsize=9)
    figure.axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
