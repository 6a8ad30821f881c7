"""The learning rate for a setting, found by three to five short runs instead of believed.

    rates    the default x 0.3, x 1, x 3 (halfbyte/train/resolve.py has the defaults: full fine-tuning a tenth of the adapters')
    unstable   a point that diverged: it is out, and so is every rate above it
    no better  a point that ended above the loss it began with, or above its lower neighbour's: it alone is out
    chosen     the lowest held-out loss of those left; equal losses give the higher rate
    edge       when the chosen rate is the highest or the lowest tried, one more beyond it (x 3, or / 3), five points at most;
               when none is better, one more above where none moved the loss by more than STILL, else one more below

Every point trains on the same rows in the same order from the same start for one pass, with its own whole schedule, and is judged by rows
that were not trained on.  A short run likes a somewhat higher rate than a long one.

Sources: the three factors and "the highest stable" from the practice of the LoRA and QLoRA papers; each method its own rate, or comparisons
lie: https://arxiv.org/abs/2602.04998, https://thinkingmachines.ai/blog/lora/
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte import devices
from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError, NumericError
from halfbyte.optim.schedules import of_another_length
from halfbyte.studies.base import shared
from halfbyte.studies.identity import digests_of, models_of
from halfbyte.studies.rows import prepare
from halfbyte.studies.runs import (
    DIVERGED,
    DOES_NOT_FIT,
    Folder,
    Say,
    drop_weights,
    failure,
    opened,
    require_same,
    train,
    write_json,
)
from halfbyte.train.resolve import total_steps

FACTORS = (0.3, 3.0)
"""Tried beside the default, which the first point shows."""
MOST_POINTS, STEP = 5, 3.0
HIGHEST = 1.0
"""The largest learning rate that settings allow."""
FEW_STEPS = 10
"""Below so many optimizer steps a point is mostly warm-up, and a high rate looks better than it is."""
STILL = 0.005
"""A loss within this share of where it began has not moved: the rate is too low to show anything."""
EVAL_AT_END = 10**6


@dataclass(frozen=True)
class Point:
    """One short run: its rate, and its held-out loss in nats per token before and after; None after where it diverged."""

    rate: float
    before: float
    after: float | None
    seconds: float = 0.0

    @property
    def stable(self) -> bool:
        """It ended with a finite loss."""
        return self.after is not None and math.isfinite(self.after)

    @property
    def still(self) -> bool:
        """It is stable and its loss has hardly moved."""
        return self.stable and abs(_loss(self) - self.before) <= STILL * self.before


@dataclass(frozen=True)
class Found:
    """The points in order of rate, why each is in or out, the chosen rate, and what this rests on."""

    points: list[Point]
    reasons: list[str]
    rate: float
    rows: int
    steps: int

    @property
    def edge(self) -> str:
        """Which edge of what was tried the chosen rate lies at: "highest", "lowest", or "" where it has neighbours on both sides."""
        rates = [point.rate for point in self.points]
        return "highest" if self.rate == rates[-1] else "lowest" if self.rate == rates[0] else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "edge": self.edge or None, "note": self.caution or None}

    @property
    def caution(self) -> str:
        """What to think of points of few steps; "" for longer ones."""
        if self.steps >= FEW_STEPS:
            return ""
        return f"after {self.steps:,} step{'' if self.steps == 1 else 's'}: take it as an upper bound; more --rows say more"

    def lines(self) -> list[list[str]]:
        """Rows of a table: rate, held-out loss before and after, seconds, why."""
        return [
            [f"{point.rate:.3g}", f"{point.before:.4f}", "not finite" if point.after is None else f"{point.after:.4f}",
             f"{point.seconds:.1f} s", reason]
            for point, reason in zip(self.points, self.reasons, strict=True)
        ]  # fmt: skip


def line_titles(per: str) -> list[str]:
    """The columns of `Found.lines`; `per` is what a loss is the mean of."""
    return ["learning rate", f"held-out loss before, nats/{per}", f"after, nats/{per}", "time", "judged"]


def judge(points: Sequence[Point]) -> tuple[list[str], Point | None]:
    """Why each point (in order of rate) is in or out, and the chosen one; None where none is stable and better than before.

    >>> judge([Point(0.1, 3.0, 2.5), Point(0.3, 3.0, 2.0), Point(1.0, 3.0, 2.2)])[0]
    ['stable, not the lowest', 'chosen: the lowest held-out loss', 'out: worse than its lower neighbour 0.3']
    """
    reasons: list[str] = []
    kept: list[Point] = []
    for number, point in enumerate(points):
        below = points[number - 1] if number else None
        if not point.stable:
            reasons.append("out: diverged")
        elif not all(other.stable for other in points[:number]):
            reasons.append("out: a lower rate is unstable")
        elif _loss(point) > point.before:
            reasons.append("out: worse than before the training")
        elif below is not None and _loss(point) > _loss(below):
            reasons.append(f"out: worse than its lower neighbour {below.rate:.3g}")
        else:
            reasons.append("stable, not the lowest")
            kept.append(point)
    best = min(kept, key=lambda point: (_loss(point), -point.rate), default=None)
    if best is not None:
        edge = f", at the {'highest' if best is points[-1] else 'lowest'} rate tried" if best in (points[0], points[-1]) else ""
        reasons[list(points).index(best)] = f"chosen: the lowest held-out loss{edge}"
    return reasons, best


def next_rate(points: Sequence[Point]) -> float | None:
    """The rate beyond the edge that is still to be tried, None where the chosen one has neighbours or enough was tried.

    Where none is better than before, rates that hardly moved the loss are too low, and any others too high.

    >>> next_rate([Point(0.01, 3.0, 2.5), Point(0.03, 3.0, 2.0)]), next_rate([Point(0.1, 3.0, 2.0), Point(0.3, 3.0, 2.1)])
    (0.09, 0.0333)
    """
    if len(points) >= MOST_POINTS:
        return None
    best = judge(points)[1]
    if best is None and all(point.still for point in points):
        best = points[-1]
    if best is None or best is points[0]:
        return _rounded(points[0].rate / STEP)
    return _rounded(points[-1].rate * STEP) if best is points[-1] and points[-1].rate * STEP <= HIGHEST else None


def _loss(point: Point) -> float:
    return math.inf if point.after is None else point.after


def _rounded(rate: float) -> float:
    """Three digits, so that the rate is the same in a table and in a command."""
    return float(f"{rate:.3g}")


def short(config: RunConfig, rows: Path, count: int, held_out: Path, rate: float | str) -> RunConfig:
    """The settings of one point: one pass over the sweep's `count` rows, judged before and after, nothing saved on the way."""
    pass_steps = math.ceil(count / config.train.global_batch_size)
    steps = config.train.max_steps if (config.train.max_steps or pass_steps) < pass_steps else None
    return config.model_copy(update={
        "data": config.data.model_copy(update={"path": str(rows), "eval_path": str(held_out), "eval_rows": "auto", "max_rows": None}),
        "optim": config.optim.model_copy(update={"learning_rate": rate}),
        "train": config.train.model_copy(update={
            "epochs": 1.0, "max_steps": steps, "eval_every_steps": EVAL_AT_END, "save_every_steps": None, "keep_best": False,
            "sample_prompts": 0, "early_stop_patience": None, "trackers": (), "on_nan": "stop",
        }),
    })  # fmt: skip


def find(folder: Folder, name: str, config: RunConfig, *, rows: Path, count: int, held_out: Path, planned_rows: int) -> Found:
    """Run the points that are not there yet, in `<folder>/<name>/x<factor>`, and choose; `config` is the setting without its rate.

    rows, count, held_out   the files of the short runs, and the number of rows to train on
    planned_rows            how many rows the run has that the rate is for: its warm-up in steps is the same share of a short run
    Raises NumericError where no rate makes it better, DoesNotFitError where the first point does not fit, and whatever else stops a run.
    """
    optim = of_another_length(config.optim, total_steps(config, planned_rows))
    config = config.model_copy(update={"optim": optim})
    outcomes: dict[float, dict[str, Any]] = {}
    rates: dict[float, float] = {}

    def try_at(factor: float, rate: float | str) -> None:
        at = f"{name}/x{factor:.3g}"
        told = "the default learning rate" if isinstance(rate, str) else f"learning rate {rate:.3g}"
        folder.say(f"{at}: point {len(outcomes) + 1} of up to {MOST_POINTS}, {told}")
        outcome = train(folder, at, short(config, rows, count, held_out, rate))
        drop_weights(folder.path / at)
        if outcome["status"] == "does not fit" or "rate" not in outcome:
            raise failure(DOES_NOT_FIT if outcome["status"] == "does not fit" else DIVERGED, folder.path / f"{at}.log")
        outcomes[factor], rates[factor] = outcome, float(outcome["rate"])
        after = outcome.get("last_eval_loss")
        ended = outcome["status"] if after is None else f"held-out loss {after:.4f}"
        folder.say(f"{at}: learning rate {rates[factor]:.3g}, {ended}")

    try_at(1.0, config.optim.learning_rate)
    for factor in FACTORS:
        if rates[1.0] * factor <= HIGHEST:
            try_at(factor, _rounded(rates[1.0] * factor))
    while (further := next_rate(points := _points(outcomes))) is not None:
        try_at(further / rates[1.0], further)
    reasons, best = judge(points)
    if best is None:
        raise NumericError(
            "a setting needs a learning rate that makes it better", code="E-NUM-411", place=name,
            found="; ".join(f"{point.rate:.3g} {reason}" for point, reason in zip(points, reasons)),
            expected="a held-out loss not above the one before the training",
            remedy=f"give a {'higher' if all(point.still for point in points) else 'lower'} optim.learning_rate to begin the sweep at",
        )  # fmt: skip
    steps = max(outcome.get("steps", 0) for outcome in outcomes.values())
    kept = max(outcome.get("train_rows", count) for outcome in outcomes.values())
    seen = kept if config.data.packing else min(kept, steps * config.train.global_batch_size)  # a packed step's rows are not counted
    return Found(points, reasons, best.rate, seen, steps)


def _points(outcomes: dict[float, dict[str, Any]]) -> list[Point]:
    """The outcomes of the short runs in order of rate."""
    found = [
        Point(float(one["rate"]), one.get("first_eval_loss", math.inf), one.get("last_eval_loss") if one["status"] == "finished" else None,
              one.get("seconds", 0.0))
        for one in outcomes.values()
    ]  # fmt: skip
    return sorted(found, key=lambda point: point.rate)


def alone(config: RunConfig, path: Path, sweep_rows: int, say: Say) -> Found:
    """The rate for one setting, in a folder of its own; what was run there before with the same settings is kept.

    Raises ConfigError without rows, CheckpointError where the folder holds the sweep of another setting.
    """
    if sweep_rows < 1:
        raise ConfigError("short runs train on rows", code="E-CONF-419", place="--rows", found=str(sweep_rows), expected="1 or more",
                          nothing_done="Nothing was trained.")  # fmt: skip
    with opened(path, say) as folder:
        now = {"settings": config.model_dump(mode="json", exclude={"out"}), "rows": sweep_rows, "versions": devices.versions(),
               "files": digests_of(config.model.template), "models": models_of(config.model.name)}  # fmt: skip
        require_same(folder.path / "study.json", now)
        found = prepare(folder.path, config, sweep_rows=sweep_rows)
        place = folder.path / "rows"
        rows = config.data.model_copy(update={"path": str(place / "sweep-train.jsonl"), "eval_path": str(place / "sweep-held-out.jsonl")})
        config, _ = shared(folder, "setting", config.model_copy(update={"data": rows}))
        sweep = find(
            folder, "points", config, rows=place / "sweep-train.jsonl", count=found["sweep-train"],
            held_out=place / "sweep-held-out.jsonl", planned_rows=found["train"],
        )  # fmt: skip
        write_json(folder.path / "learning-rate.json", sweep.as_dict())
        return sweep
