"""Pictures of a comparison as PNG bytes, drawn with matplotlib's Agg canvas and no global state."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfbyte.pages.page import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#c8541f", "#4a7d45", "#7b4a9b", "#8a6d1f", "#2b8a8a", "#a83258", "#555555")
MARKS = "os^Dv<>P"
GIB = 2**30


def _figure(height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain(name: str) -> str:
    """A name as matplotlib draws it letter by letter: no mathematics between dollar signs, no control characters, no secrets."""
    return clean(name).replace("$", r"\$")


def loss_curves(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]], unit: str = "nats/token") -> bytes:
    """Held-out loss over steps; `curves` has for each setting one list of (step, loss) a seed.  PNG, 900 x 420 pixels."""
    figure = _figure(4.2)
    axes = figure.subplots()
    for number, (name, seeds) in enumerate(curves.items()):
        shared = sorted(set.intersection(*({point[0] for point in seed} for seed in seeds))) if seeds else []
        values = [[{point[0]: point[1] for point in seed}[step] for seed in seeds] for step in shared]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(shared, [sum(one) / len(one) for one in values], color=colour, marker=MARKS[number % len(MARKS)], markersize=4,
                  linewidth=1.5, label=_plain(name))  # fmt: skip
        axes.fill_between(shared, [min(one) for one in values], [max(one) for one in values], color=colour, alpha=0.15, linewidth=0)
    if curves:
        axes.legend(frameon=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"held-out loss, {unit}")
    axes.grid(alpha=0.25)
    return _png(figure)


def loss_against_memory(points: Mapping[str, tuple[float, float, float | None]], unit: str = "nats/token") -> bytes:
    """Last held-out loss against peak memory; `points` has (bytes, loss, standard deviation or None) a setting.  PNG, 900 x 380 pixels."""
    figure = _figure(3.8)
    axes = figure.subplots()
    for number, (name, (size, loss, deviation)) in enumerate(points.items()):
        axes.errorbar([size / GIB], [loss], yerr=None if deviation is None else [deviation], color=COLOURS[number % len(COLOURS)],
                      marker=MARKS[number % len(MARKS)], markersize=8, capsize=4, linestyle="none", label=_plain(name))  # fmt: skip
    if points:
        axes.legend(frameon=False)
    axes.set_xlim(0, 1.08 * max((size / GIB for size, _, _ in points.values()), default=1.0))
    axes.set_xlabel("peak memory of the process, GiB")
    axes.set_ylabel(f"held-out loss, {unit}")
    axes.grid(alpha=0.25)
    return _png(figure)
