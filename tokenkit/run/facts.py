"""What a run says of itself for those who read its folder later: `facts.json`.

command       as it was typed, secrets blacked out
versions      of Python and the packages that compute
began         UTC; `resumed` holds the times at which it went on
device, ranks, parameters, trained
embedding_rows    how many rows of a new vocabulary were made in which way
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenkit.disk import write_durably
from tokenkit.run.redaction import redact

FACTS_NAME = "facts.json"
_PACKAGES = ("tokenkit-torch", "torch", "triton", "transformers", "tokenizers", "peft", "datasets", "numpy")
_LARGEST = 2**20  # bytes; more is none of ours


def write_facts(folder: Path, found: Mapping[str, Any], *, resumed: bool) -> None:
    """Write the facts of a run that begins, or the time at which it goes on."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = read_facts(folder) if resumed else {}
    if before:
        facts = before | {"resumed": [*before.get("resumed", []), now]}
    else:
        command = [redact(word) for word in sys.argv]
        facts = {"command": command, "versions": versions(), "began": now, **found}
    write_durably(folder / FACTS_NAME, json.dumps(facts, indent=1) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what the file says; empty where it says nothing, as in runs before it was written."""
    path = folder / FACTS_NAME
    with suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= _LARGEST:
            found = json.loads(path.read_bytes())
            return found if isinstance(found, dict) else {}
    return {}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
