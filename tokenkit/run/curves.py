"""The pictures of a run: `curves.png`, drawn from its `metrics.jsonl`, and rows of numbers as a heat map."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from tokenkit.disk import write_durably
from tokenkit.run.metrics import METRICS_NAME, read_metrics

PANELS = {  # by the first part of a metric's name, in this order
    "loss": "loss (nats)",
    "excess": "loss over its least value (nats)",
    "bits_per_byte": "bits per byte, held out",
    "task_score": "benchmarks (score)",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}
NOISY = ("loss", "excess", "grad_norm", "tokens_per_second")  # drawn pale, under their moving average
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito


def draw_curves(folder: Path) -> None:
    """Draw `folder/curves.png` from its `metrics.jsonl`; nothing where there is nothing to draw."""
    series = series_of(read_metrics(folder / METRICS_NAME))
    panels = [prefix for prefix in PANELS if prefix in series]
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for colour, (name, points) in zip(cycle(_COLOURS), sorted(series[panel].items()), strict=False):
            steps, values = zip(*points, strict=True)
            noisy = panel in NOISY and len(values) > 50
            axes.plot(
                steps,
                values,
                color=colour,
                lw=1,
                alpha=0.25 if noisy else 1,
                label=None if noisy else name,
                marker="o" if len(values) < 3 else None,  # one point makes no line
            )
            if noisy:
                axes.plot(steps, _smooth(values), color=colour, lw=1.6, label=name)
        axes.set_title(PANELS[panel], fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        if len(series[panel]) > 1:
            axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_durably(folder / "curves.png", picture.getvalue())


def series_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return finite (step, value) points by panel, then by name."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            panel, _, rest = name.partition("/")
            if panel in PANELS and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(panel, {}).setdefault(rest or "total", []).append((line["step"], value))
    return series


def _smooth(values: tuple[float, ...], half_life: float = 10.0) -> list[float]:
    """Exponential moving average, corrected for its start."""
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        smooth.append(total / weight)
    return smooth


def draw_heatmap(path: Path, rows: Mapping[str, Sequence[float]], title: str) -> None:
    """Draw rows of numbers, of any lengths, as a PNG file; nothing where there are none."""
    width = max(map(len, rows.values()), default=0)
    if not width:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.35 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [[*row, *[math.nan] * (width - len(row))] for row in rows.values()]
    figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis"))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("rank")
    axes.set_title(title, fontsize=10)
    figure.savefig(path)
