"""The report as one HTML page: no script, no font, no picture from elsewhere, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenkit.evaluation.report import parts
from tokenkit.evaluation.report.charts import line_chart
from tokenkit.evaluation.report.html import Child, Safe, el, joined, table
from tokenkit.evaluation.report.style import CSS
from tokenkit.run.curves import NOISY, PANELS

Runs = Sequence[Mapping[str, Any]]


def page(report: Mapping[str, Any]) -> str:
    """Return the page of what `report.json` holds."""
    runs: Runs = report["runs"]
    title = " · ".join(run["name"] for run in runs)
    sections = (
        ("Not comparable", parts.notes(report["differences"]) if report["differences"] else None),
        ("Bits per byte", _bits(runs)),
        ("Curves", _curves(runs)),
        ("Kinds of text", _each(runs, "by_class", parts.by_class)),
        ("Bytes per token", _each(runs, "bytes_per_token", parts.bytes_per_token)),
        ("Vocabulary", _each(runs, "overlap", parts.overlap)),
        ("How the new embeddings were made", _each(runs, "embeddings", parts.embeddings)),
        ("Alignment", _each(runs, "alignments", parts.alignments)),
        ("What the model writes", _each(runs, "samples", parts.samples)),
        ("Tasks", parts.tasks(runs)),
        ("Configuration", parts.configuration(runs)),
        ("Command, versions and time", parts.origin(runs)),
        ("Left out", _each(runs, "notes", parts.notes)),
    )
    body = [_section(name, content) for name, content in sections if content]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el(
            "meta", http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        el("link", rel="icon", href="data:,"),
        el("title", f"{title}: report of a run" if len(runs) == 1 else f"{title}: report of runs"),
        el("style", Safe(CSS)),
    )  # fmt: skip
    footer = el("footer", el("p", f"Written by tokenkit {report['tokenkit']} on {report['made']}."))
    shown = el("body", _head(runs, title), el("main", body), footer)
    return f"<!doctype html>\n{el('html', head, shown, lang='en')}\n"


def _section(name: str, content: Child) -> Safe:
    anchor = "".join(c if c.isalnum() else "-" for c in name.lower())
    return el("section", el("h2", name, id=anchor), content, aria_labelledby=anchor)


def _head(runs: Runs, title: str) -> Safe:
    kicker = "Report of a run" if len(runs) == 1 else f"Report of {len(runs)} runs"
    leads = [el("p", parts.sentence(run, with_name=len(runs) > 1), class_="lead") for run in runs]
    return el("header", el("p", kicker, class_="kicker"), el("h1", title), leads, _tiles(runs))


def _tiles(runs: Runs) -> Safe | None:
    if len(runs) != 1:
        return None
    made = [
        el("div", el("dt", name), el("dd", big, class_="big"), el("dd", under, class_="under"), class_="tile")
        for name, big, under in parts.key_figures(runs[0])
    ]
    return el("dl", made, class_="tiles") if made else None


def _each(runs: Runs, field: str, draw: Any) -> Safe | None:
    """Return a part for each run that has it, under its name where there are several."""
    found = [
        [el("h3", run["name"]) if len(runs) > 1 else None, draw(run[field])] for run in runs if run.get(field)
    ]
    return joined(found) if found else None


def _bits(runs: Runs) -> Safe | None:
    measured = [run for run in runs if run.get("bits_per_byte")]
    if not measured:
        return None
    names = ("teacher", "before", "after")
    figures = [
        run["bits_per_byte"][name] for run in measured for name in names if run["bits_per_byte"].get(name)
    ]
    low, high = min(figures), max(figures)
    margin = (high - low) * 0.08 or 0.05
    ends = low - margin, high + margin
    tracks = [
        [el("h3", run["name"]) if len(runs) > 1 else None, parts.track(run["bits_per_byte"], ends)]
        for run in measured
    ]
    keys = el(
        "ul",
        el("li", el("i", class_="before"), " student before training"),
        el("li", el("i", class_="after"), " student after"),
        el("li", el("i", class_="line"), " teacher"),
        class_="keys", aria_hidden="true",
    )  # fmt: skip
    scale = el(
        "p", el("span", f"{ends[0]:.3f}"), el("span", f"{ends[1]:.3f}"), class_="scale", aria_hidden="true"
    )
    rows = [parts.bits_row(run) for run in measured]
    head = ("Run", "Teacher", "Before", "After", "Change", "Over teacher", "Bytes")
    sources = sorted(
        {
            f"{name.capitalize()}: {run['bits_per_byte'][f'{name}_from']}."
            for run in measured
            for name in ("before", "after")
            if run["bits_per_byte"].get(f"{name}_from")
        }
    )
    about = el(
        "p",
        "Bits that a model needs for each byte of text, whatever its tokenizer; lower is better. ",
        " ".join(sources),
        class_="lead",
    )
    return joined([about, keys, tracks, scale, table("Bits per byte of teacher and student", head, rows)])


def _curves(runs: Runs) -> Safe | None:
    """Return small pictures, one for each kind of number; a run has a colour, or a name where it is alone."""
    figures = []
    kinds = {kind: None for kind in PANELS} | {kind: None for run in runs for kind in run["curves"]}
    for kind in kinds:
        names = sorted({name for run in runs for name in run["curves"].get(kind, {})})
        if len(names) == 2 and "total" in names:  # the sum of one is that one
            names.remove("total")
        # losses are of sizes that hardly fit one scale
        groups = [[name] for name in names] if kind == "loss" and len(names) > 1 else [names]
        for group in groups:
            series = {}
            for number, run in enumerate(runs):
                for index, name in enumerate(group):
                    points = run["curves"].get(kind, {}).get(name)
                    if points:
                        label = name if len(runs) == 1 else run["name"]
                        label += f" {name}" if len(runs) > 1 < len(group) else ""
                        series[(index, 0) if len(runs) == 1 else (number, index)] = label, points
            if series:
                title = PANELS.get(kind, kind.replace("_", " "))
                title = f"{title}: {group[0]}" if len(groups) > 1 else title
                figures.append(line_chart(title, series, noisy=kind in NOISY))
    return el("div", figures, class_="panels") if figures else None
