"""What the files of a run's folder say of it, without loading a model or a tokenizer.

A run may have been cut at any time and may be older than this version: whatever is missing is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenkit.config import TrainConfig
from tokenkit.config.schema import leaves
from tokenkit.config.yaml_files import read_yaml
from tokenkit.errors import ConfigError
from tokenkit.evaluation.report.comparable import heldout_text
from tokenkit.export.card import public_name
from tokenkit.run.curves import series_of
from tokenkit.run.ending import read_outcome
from tokenkit.run.facts import read_facts
from tokenkit.run.metrics import METRICS_NAME, read_metrics
from tokenkit.run.redaction import redact_config

MOST_POINTS = 400
"""Of a curve in the report; metrics.jsonl keeps all."""
_LARGEST = 64 * 2**20  # bytes of a file of results


def _without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without keys; fields of our own hold none, whatever words their names have."""
    own = {leaf.name for leaf in leaves(TrainConfig)}
    return {name: redact_config(value, "" if name in own else name) for name, value in config.items()}


def read_run(folder: Path, results: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the facts of a run, as they stand in the report's JSON.

    Args:
        folder: of the run.
        results: further files of results, as lm-eval writes them.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    if not any((folder / name).exists() for name in ("config.yaml", METRICS_NAME, "checkpoints")):
        raise FileNotFoundError(
            f"{folder} holds no run: expected config.yaml or {METRICS_NAME}, which `tokenkit train` writes"
        )
    notes: list[str] = []
    config, lines = _config(folder, notes), _lines(folder, notes)
    facts, outcome = read_facts(folder), read_outcome(folder)
    steps, last = config.get("steps"), max((line["step"] for line in lines), default=0)
    return {
        "name": _name(folder, config),
        "student": _public(config.get("student.pretrained_model_name_or_path")),
        "teacher": _public(config.get("teacher.pretrained_model_name_or_path")),
        "target_tokenizer": _public(config.get("target_tokenizer_name")),
        "losses": _listed(config.get("losses")),
        "state": {
            "outcome": str(outcome.get("outcome", "unknown")),
            "reason": str(outcome.get("reason", "no outcome.json: the run was cut, or goes on")),
            "step": _whole(outcome.get("step"), last),
            "steps": steps if isinstance(steps, int) else None,
        },
        "curves": {panel: dict(_thinned(series)) for panel, series in series_of(lines).items()},
        "bits_per_byte": _bits(lines, config),
        "embeddings": _embeddings(facts),
        "tasks": [row for path in (*_results(folder), *results) for row in read_tasks(path, notes)],
        "command": shown_words(facts.get("command", [])),
        "versions": {str(k): str(v) for k, v in _mapping(facts.get("versions")).items()},
        "timings": _timings(facts, outcome, lines),
        "size": {k: v for k in ("parameters", "trained", "ranks") if (v := _number(facts.get(k))) is not None}
        | {k: facts[k] for k in ("device",) if isinstance(facts.get(k), str)},
        "config": {name: shown(value) for name, value in _without_secrets(config).items()},
        "notes": notes,
    }


def _name(folder: Path, config: Mapping[str, Any]) -> str:
    name = config.get("name")
    return str(name) if name not in (None, "", "tokenkit") else folder.resolve().name


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Return the configuration by dotted names."""
    if not (folder / "config.yaml").is_file():
        notes.append("config.yaml is missing")
        return {}
    try:
        return dict(_flat("", read_yaml(folder / "config.yaml")))
    except (ConfigError, OSError, ValueError) as error:
        notes.append(f"config.yaml cannot be read: {error}")
        return {}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(f"{prefix}{name}.", inner)
        else:
            yield f"{prefix}{name}", inner


def _lines(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return read_metrics(folder / METRICS_NAME)
    except (OSError, ValueError) as error:
        notes.append(str(error))
        return []


def _thinned(series: Mapping[str, list[tuple[int, float]]]) -> Iterator[tuple[str, list[list[float]]]]:
    for name, points in sorted(series.items()):
        every = -(-len(points) // MOST_POINTS)
        kept = points[::every]
        yield name, [[step, value] for step, value in (kept if points[-1] in kept else [*kept, points[-1]])]


def _bits(lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what training measured of teacher and student: at step 0 if it did, and at its last."""
    measured = [line for line in lines if _number(line.get("bits_per_byte/student")) is not None]
    if not measured:
        return None
    first, last = measured[0], measured[-1]
    found = {
        "after": last["bits_per_byte/student"],
        "after_from": f"step {last['step']} of the run, on its held-out text",
        "teacher": _number(last.get("bits_per_byte/teacher")),
        "bytes": _number(last.get("heldout_bytes")),
        "text": heldout_text(config, _number(last.get("heldout_bytes"))),
    }
    if first["step"] == 0:
        found |= {
            "before": first["bits_per_byte/student"],
            "before_from": "step 0 of the run: the new vocabulary, not trained yet",
        }
    return found


def _embeddings(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    counts = _mapping(facts.get("embedding_rows"))
    counts = {str(k): v for k, v in counts.items() if isinstance(v, int)}
    return {"counts": counts, "from": "the run's own count"} if counts else None


def _timings(
    facts: Mapping[str, Any], outcome: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    said = (_number(line.get("tokens_per_second")) for line in lines)
    rates = sorted(rate for rate in said if rate is not None)
    found: dict[str, Any] = {}
    if rates:
        found["tokens_per_second"] = rates[len(rates) // 2]
    with suppress(KeyError, TypeError, ValueError):
        began, ended = datetime.fromisoformat(facts["began"]), datetime.fromisoformat(outcome["time"])
        found |= {"began": facts["began"], "seconds": (ended - began).total_seconds()}
    if isinstance(facts.get("resumed"), list):
        found["resumed"] = len(facts["resumed"])
    return found


def _results(folder: Path) -> list[Path]:
    """Return what lm-eval left in a run's folder."""
    names = ("results*.json", "eval*.json", "eval*/**/results*.json")
    return sorted({path for name in names for path in folder.glob(name) if path.is_file()})


def read_tasks(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the scores of a file as lm-eval writes it: task, metric, value, standard error."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("larger than 64 MiB")
        whole = json.loads(path.read_bytes())
        results, rows = whole["results"], []
        for task, scores in results.items():
            for name, value in scores.items():
                metric, _, form = name.partition(",")
                if _number(value) is None or metric.endswith("_stderr"):
                    continue
                rows.append(
                    {
                        "task": str(scores.get("alias", task)).strip(" -"),
                        "metric": metric if form in ("", "none") else f"{metric} ({form})",
                        "value": value,
                        "stderr": _number(scores.get(f"{metric}_stderr,{form}")),
                        "asked": _asked(whole, task),
                        "file": path.name,
                    }
                )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        notes.append(f"{path.name} holds no results of lm-eval: {type(error).__name__}")
        return []
    return rows


def _asked(results: Mapping[str, Any], task: str) -> str:
    """Return in words which questions a score is over, as far as lm-eval says so."""
    counts = _mapping(_mapping(results.get("n-samples")).get(task))
    said = [(counts.get("effective"), "questions"), (_mapping(results.get("n-shot")).get(task), "examples")]
    said.append((_mapping(results.get("versions")).get(task), "version"))
    return ", ".join(f"{value} {what}" for value, what in said if isinstance(value, int | float))


def shown(value: Any) -> Any:
    """Return a setting without where things lie on this machine."""
    if isinstance(value, str):
        return public_name(value) if value.startswith(("/", "~", "./", "../")) else value
    if isinstance(value, list):
        return [shown(one) for one in value]
    is_plain = value is None or isinstance(value, bool | int) or _number(value) is not None
    return value if is_plain else str(value)


def shown_words(words: Any) -> list[str]:
    """Return a command line as it may be published: paths become names."""
    if not isinstance(words, list):
        return []
    found = []
    for word in map(str, words):
        flag, equals, value = word.partition("=")
        found.append(f"{flag}={shown(value)}" if equals else str(shown(word)))
    return found


def _public(name: Any) -> str | None:
    return public_name(name) if isinstance(name, str) and name else None


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> Any:
    """Return a finite number; None: it is something else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value > 0 else otherwise
