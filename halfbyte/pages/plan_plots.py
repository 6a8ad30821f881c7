"""The picture of a plan: memory of each method by term, as bars, with what is there as a line; PNG bytes, no global state."""

import io
from collections.abc import Mapping, Sequence


def memory_bars(methods: Sequence[str], terms: Mapping[str, Sequence[float]], available_gib: float) -> bytes:
    """One bar for each method, built from its terms in GiB; the line is what the place has.  PNG, 900 pixels wide."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.6 * len(methods)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours, left = colormaps["tab20"].colors, [0.0] * len(methods)  # type: ignore[attr-defined]
    for number, (name, values) in enumerate(terms.items()):
        axes.barh(methods, values, left=left, color=colours[number % len(colours)], label=name, height=0.6)
        left = [before + value for before, value in zip(left, values)]
    axes.axvline(available_gib, color="#222222", linewidth=1.5, linestyle="--", label="available")
    axes.set_xlim(0, 1.12 * max([available_gib, *left]) if max(left) * 4 > available_gib else 1.3 * max(left))
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the peak, estimate")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.28))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
