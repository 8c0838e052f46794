"""Scores of tasks, out of lm-eval's results: numbers, a table, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenkit.evaluation.bars import draw_bars

SHARES = ("acc_norm", "acc", "exact_match", "pass@1", "f1")
"""Scores from 0 to 1 that a picture shows: of each task the first that it has."""
COSTS = ("bits_per_byte", "perplexity", "word_perplexity")
"""Those of a picture where no task has such a score."""


class Score(NamedTuple):
    """One number of one task, or of a group of tasks."""

    task: str
    metric: str
    """With its filter behind a comma, where a task reads its answers in several ways."""
    value: float
    error: float | None
    """Standard error; None: lm-eval gives none."""


def scores_of(results: Mapping[str, Any]) -> list[Score]:
    """Return the numbers of lm-eval's results, in its order."""
    found = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            own = float(error) if isinstance(error, int | float) else None
            found.append(Score(task, metric if kind == "none" else f"{metric},{kind}", float(value), own))
    return found


def labels(names: Iterable[str]) -> dict[str, str]:
    """Return a short name for each model, which is also one for a folder."""
    found: dict[str, str] = {}
    for name in names:
        parts = Path(name).parts
        short = next("_".join(parts[-n:]) for n in range(1, len(parts) + 1) if parts[-n] != "export")
        same = sum(other == short or other.startswith(f"{short}-") for other in found.values())
        found[name] = f"{short}-{same + 1}" if same else short
    return found


def table(models: Mapping[str, list[Score]]) -> str:
    """Return the scores as Markdown: a row for each task and metric, a column for each model."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for model, scores in models.items():
        for score in scores:
            error = "" if score.error is None or math.isnan(score.error) else f" ± {score.error:.4f}"
            rows.setdefault((score.task, score.metric), {})[model] = f"{score.value:.4f}{error}"
    lines = [["task", "metric", *models]]
    lines += [[*names, *(cells.get(model, "") for model in models)] for names, cells in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    ]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([texts[0], rule, *texts[1:]])


def picture(models: Mapping[str, list[Score]]) -> bytes:
    """Return a PNG: a bar for each task and model."""
    tasks = list(dict.fromkeys(score.task for scores in models.values() for score in scores))
    by_kind = [{task: _first(kinds, task, models) for task in tasks} for kinds in (SHARES, COSTS)]
    chosen, words = by_kind[0], "score"
    if not any(chosen.values()):
        chosen, words = by_kind[1], "lower is better"
    groups = [task for task, metric in chosen.items() if metric is not None]
    heights = {
        model: [
            next((s.value for s in scores if (s.task, s.metric) == (task, chosen[task])), math.nan)
            for task in groups
        ]
        for model, scores in models.items()
    }
    return draw_bars([f"{task}\n{chosen[task]}" for task in groups], heights, words)


def _first(kinds: tuple[str, ...], task: str, models: Mapping[str, list[Score]]) -> str | None:
    own = [score.metric for scores in models.values() for score in scores if score.task == task]
    return next((metric for kind in kinds for metric in own if metric.partition(",")[0] == kind), None)
