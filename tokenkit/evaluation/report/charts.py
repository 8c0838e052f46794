"""Curves as SVG in the page's own colours, which follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tokenkit.evaluation.report.html import Safe, el

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24
COLOURS = 6
"""Of the style sheet: s0 to s5."""
DASHES = ("", "6 3", "2 3", "8 3 2 3")

Points = Sequence[Sequence[float]]


def line_chart(title: str, series: Mapping[tuple[int, int], tuple[str, Points]], *, noisy: bool) -> Safe:
    """Return a figure.

    Args:
        title: above it.
        series: by number of colour and of dash, a name and its (step, value) points.
        noisy: long curves are drawn pale, under their moving average.
    """
    xs = [point[0] for _, points in series.values() for point in points]
    ys = [point[1] for _, points in series.values() for point in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 4), ticks(min(ys), max(ys), 4)
    x_range = min(xs), max(max(xs), min(xs) + 1)
    y_range = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn: list[Safe] = []
    for tick in y_ticks:
        _, y = at(x_range[0], tick)
        drawn.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        drawn.append(el("text", short(tick), x=LEFT - 6, y=f"{y + 3.5:.1f}", text_anchor="end"))
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x, _ = at(tick, y_range[0])
            anchor = "end" if x > WIDTH - 30 else "middle"
            drawn.append(el("text", short(tick), x=f"{x:.1f}", y=HEIGHT - 7, text_anchor=anchor))
    for (colour, dash), (_, points) in series.items():
        look = f"s{colour % COLOURS}", DASHES[dash % len(DASHES)] or None
        if noisy and len(points) > 50:
            drawn.append(_curve([at(*p) for p in points], f"{look[0]} pale", None))
            points = smooth(points)
        drawn.append(_curve([at(*p) for p in points], *look))
        end = at(*points[-1])
        drawn.append(el("circle", cx=f"{end[0]:.1f}", cy=f"{end[1]:.1f}", r=2.6, class_=f"{look[0]} end"))
    ends = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in series.values())
    picture = el(
        "svg", drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart",
        aria_label=f"{title} by step, up to step {max(xs):.0f}; at the end: {ends}",
    )  # fmt: skip
    legend = el("ul", (_entry(*key, *value) for key, value in series.items()), class_="legend")
    return el("figure", el("figcaption", title), picture, legend, class_="panel")


def _curve(points: Sequence[tuple[float, float]], colour: str, dash: str | None) -> Safe:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return el("path", d=path, class_=colour, stroke_dasharray=dash)


def _entry(colour: int, dash: int, name: str, points: Points) -> Safe:
    stroke = DASHES[dash % len(DASHES)] or None
    line = el("line", x1=0, x2=22, y1=5, y2=5, class_=f"s{colour % COLOURS}", stroke_dasharray=stroke)
    swatch = el("svg", line, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")
    return el("li", swatch, f" {name} ", el("b", short(points[-1][1])))


def ticks(low: float, high: float, number: int) -> list[float]:
    """Return round values that hold a range between them."""
    if not high > low:
        return [low]
    raw = (high - low) / number
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number in few characters."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if 1e4 <= abs(value) < 1e15:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{letter}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def smooth(points: Points, half_life: float = 10.0) -> list[tuple[float, float]]:
    """Return the exponential moving average, corrected for its start."""
    decay, total, weight, found = 0.5 ** (1 / half_life), 0.0, 0.0, []
    for step, value in points:
        total, weight = decay * total + value, decay * weight + 1
        found.append((step, total / weight))
    return found
