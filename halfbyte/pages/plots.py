"""Pictures of a run as PNG bytes, drawn with matplotlib's Agg canvas and no global state."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the pull towards zero at the start.

    >>> [round(value, 3) for value in smoothed([1.0, 1.0, 0.0])]
    [1.0, 1.0, 0.631]
    """
    mean, made = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        made.append(mean / (1 - weight**count))
    return made


def points(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a field, where it is there and finite."""
    known = [record for record in records if isinstance(record.get(name), int | float)]
    pairs = [(record["step"], record[name]) for record in known if math.isfinite(record[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def loss_curves(records: Sequence[Record], per: str = "token") -> bytes:
    """The picture of `loss_figure` as PNG, 900 x 450 pixels."""
    buffer = io.BytesIO()
    loss_figure(records, per).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def loss_figure(records: Sequence[Record], per: str = "token") -> Any:
    """Training loss (each step, and smoothed) and held-out loss in nats over steps, learning rate below; `per` is what a loss is the mean
    of: a trained token, or a row of a classifier."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, losses = points(records, "loss")
    if steps:
        upper.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="training, each step")
        upper.plot(steps, smoothed(losses), color="#1f5fa8", linewidth=1.8, label="training, smoothed")
    steps, losses = points(records, "eval_loss")
    if steps:
        upper.plot(steps, losses, color="#c8541f", marker="o", markersize=4, linewidth=1.5, label="held out")
    if upper.lines:
        upper.legend(frameon=False)
    upper.set_ylabel(f"loss, nats/{per}")
    upper.grid(alpha=0.25)
    steps, rates = points(records, "lr")
    lower.plot(steps, rates, color="#4a7d45", linewidth=1.2)
    lower.set_ylabel("rate")
    lower.set_xlabel("optimizer step")
    lower.grid(alpha=0.25)
    return figure
