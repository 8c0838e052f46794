"""A report of runs: gathered, and written as HTML, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit import __version__
from tokenkit.disk import write_durably
from tokenkit.evaluation.report.comparable import differences
from tokenkit.evaluation.report.folder import read_run
from tokenkit.evaluation.report.page import page

if TYPE_CHECKING:
    from tokenkit.evaluation.report.measured import Measures


def gather(folders: Sequence[Path], results: Sequence[Path], measures: Measures | None) -> dict[str, Any]:
    """Return the report as its JSON has it.

    Args:
        folders: of runs.
        results: files as lm-eval writes them, one for each run in the same order, or all of one run.
        measures: what is measured with models and tokenizers; None: nothing is loaded.

    Raises:
        FileNotFoundError: a folder holds no run.
    """
    shared = list(results) if len(folders) == 1 else []
    own = [shared or [path] for path in results] if len(folders) > 1 else [shared]
    own += [[] for _ in range(len(folders) - len(own))]
    runs = [read_run(folder, files) for folder, files in zip(folders, own, strict=False)]
    if measures is not None:
        from tokenkit.evaluation.report.measured import measure

        for run, folder in zip(runs, folders, strict=True):
            found = measure(folder, measures)
            run["notes"] += found.pop("notes")
            if run["embeddings"]:
                found.pop("embeddings", None)
            run |= found
            _fill_bits(run)
    _name_apart(runs)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return {"tokenkit": __version__, "made": made, "runs": runs, "differences": differences(runs)}


def _fill_bits(run: dict[str, Any]) -> None:
    """Take bits per byte as measured here where the run has no measurement of its own, all from one text."""
    models = run.get("by_class", {}).get("models", {})
    bits = run["bits_per_byte"] or {}
    if bits.get("before") is not None or not models.keys() & {"before", "after"}:
        return
    if bits and not {"before", "after"} <= models.keys():
        return  # one row is over one text
    text = run["by_class"]["text"]
    words = f"measured for this report, on the beginnings of documents of {text['name']}"
    run["bits_per_byte"] = {"bytes": run["by_class"]["bytes"], "text": text} | {
        key: value
        for name, one in models.items()
        for key, value in ((name, one["bits_per_byte"]), (f"{name}_from", words))
    }


def _name_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Give runs of one name a number."""
    names = [run["name"] for run in runs]
    for number, run in enumerate(runs, start=1):
        if names.count(run["name"]) > 1:
            run["name"] = f"{run['name']} ({number})"


def write(report: Mapping[str, Any], output: Path) -> list[Path]:
    """Write the page, and beside it the same as JSON and as Markdown for a model card."""
    files = {
        output: page(report),
        output.with_suffix(".json"): json.dumps(report, indent=1, allow_nan=False) + "\n",
        output.with_suffix(".md"): markdown(report),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write_durably(path, content.encode("utf-8", "replace"))
    return list(files)


def markdown(report: Mapping[str, Any]) -> str:
    """Return what a model card says of the runs: figures alone, no text of the data."""
    lines = ["## Evaluation", ""]
    rows = [("Run", "Teacher", "Before", "After", "Bytes per token, old", "new")]
    for run in report["runs"]:
        bits, rates = run.get("bits_per_byte") or {}, (run.get("bytes_per_token") or [{}])[0]
        figures = [bits.get(name) for name in ("teacher", "before", "after")]
        sizes = [rates.get(name) for name in ("old", "new")]
        rows.append(
            (
                run["name"],
                *("–" if value is None else f"{value:.4f}" for value in figures),
                *("–" if value is None else f"{value:.2f}" for value in sizes),
            )
        )
    lines += ["Bits per byte on held-out text (lower is better).", "", *_table(rows)]
    lines += [line for words in report["differences"] for line in ("", f"**{_plain(words)}.**")]
    for run in report["runs"]:
        found = run.get("by_class")
        if found:
            models = found["models"]
            rows = [("Bytes of", "Share", *models)]
            for kind, share in found["share_of_bytes_by_class"].items():
                values = (f"{one['bits_per_byte_by_class'][kind]:.4f}" for one in models.values())
                rows.append((kind, f"{share:.1%}", *values))
            lines += ["", f"### Bits per byte by kind of character: {_plain(run['name'])}", ""]
            lines += [f"{found['bytes']:,} bytes of {_plain(found['text']['name'])}.", "", *_table(rows)]
    scores = [("Task", "Metric", "Run", "Value", "Standard error")]
    for run in report["runs"]:
        for row in run["tasks"]:
            error = "–" if row["stderr"] is None else f"{row['stderr']:.4f}"
            scores.append((row["task"], row["metric"], run["name"], f"{row['value']:.4f}", error))
    if len(scores) > 1:
        lines += ["", "### Tasks", "", *_table(scores)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    written = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]
    return [written[0], "|" + " --- |" * len(rows[0]), *written[1:]]


def _plain(words: str) -> str:
    """Return words that Markdown and HTML take as words."""
    shown = "".join(c if c.isprintable() else " " for c in words)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in shown)
