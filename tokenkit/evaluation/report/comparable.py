"""Over which text a figure of a report is, and which figures therefore do not stand in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenkit.export.card import public_name

Run = Mapping[str, Any]

_NAMED = ("ppl_eval_data", "data.heldout.dataset_name")
"""Settings that name the text that a run measures itself on; without them it is a part of its data."""
_CUT = ("seed", "data.dataset_name", "data.datasets", "data.dataset_config_name", "data.split")
"""Settings that decide, with those of the held-out part, which part of its data that is."""


def text_of(name: str, *identity: object) -> dict[str, str]:
    """Return what a report keeps of a text: its name, and a digest of whatever makes it that text."""
    said = json.dumps(identity, sort_keys=True, default=str, ensure_ascii=False)
    return {"name": name, "digest": hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:12]}


def heldout_text(config: Mapping[str, Any], num_bytes: int | None) -> dict[str, str]:
    """Return the text that a run measures itself on.

    Args:
        config: of the run, by dotted names; empty where it is lost.
        num_bytes: that were scored: two runs that cut one text at other lengths read different texts.
    """
    named = next((str(config[name]) for name in _NAMED if config.get(name)), None)
    if named is not None:
        return text_of(public_name(named), named, num_bytes)
    names = [
        config.get("data.dataset_name"),
        *(_path(source) for source in config.get("data.datasets") or ()),
    ]
    called = ", ".join(public_name(str(name)) for name in names if name)
    own = [config.get(name) for name in (*_CUT, *sorted(n for n in config if n.startswith("data.heldout.")))]
    return text_of(f"the held-out part of {called or 'its data'}", own, num_bytes)


def _path(source: object) -> object:
    return source.get("path") or source.get("name") if isinstance(source, Mapping) else source


def differences(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each table whose rows or columns are over different text or questions."""
    found = []
    for field, table in (("bits_per_byte", "Bits per byte"), ("by_class", "Kinds of text")):
        of = {run["name"]: run[field] for run in runs if run.get(field)}
        if len({(one["text"]["digest"], one.get("bytes")) for one in of.values()}) > 1:
            each = "; ".join(f"{name}: {_size(one)} of {one['text']['name']}" for name, one in of.items())
            found.append(
                f"{table}: not the same text ({each}), so the figures of two runs cannot be compared"
            )
    asked: dict[str, dict[str, str]] = {}
    for run in runs:
        for row in run["tasks"]:
            asked.setdefault(row["task"], {})[run["name"]] = row.get("asked", "")
    for task, how in asked.items():
        if len(set(how.values())) > 1:
            each = "; ".join(f"{name}: {words or 'not said'}" for name, words in how.items())
            found.append(f"{task}: not the same questions ({each}), so its scores cannot be compared")
    return found


def _size(one: Mapping[str, Any]) -> str:
    return f"{one['bytes']:,} bytes" if isinstance(one.get("bytes"), int) else "unknown bytes"
