"""One picture for every comparison in bits per byte: bars in groups."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


def draw_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    line: tuple[str, float] | None = None,
) -> bytes:
    """Return a PNG.

    Args:
        groups: names under the bars.
        series: by name, one height for each group.
        ylabel: of the heights.
        line: a height to compare with, and its name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 0.8 / len(series)
    size = max(6.0, 0.5 + 0.32 * len(groups) * len(series) + 0.5 * len(groups)), 3.6
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, heights) in enumerate(series.items()):
        at = [group - 0.4 + width * (number + 0.5) for group in range(len(groups))]
        bars = axes.bar(at, heights, width * 0.94, color=COLOURS[number % len(COLOURS)], label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    if line is not None:
        axes.axhline(line[1], color="#a04040", lw=1, label=line[0])
    axes.set_xticks(
        range(len(groups)),
        groups,
        rotation=30 if len(groups) > 5 else 0,
        ha="right" if len(groups) > 5 else "center",
    )
    axes.set_ylabel(ylabel)
    if len(series) > 1 or line is not None:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
