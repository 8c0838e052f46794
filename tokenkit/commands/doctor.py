"""`tokenkit doctor`: everything that would stop or spoil a training, before it is started.

tokenkit doctor --config FILE
tokenkit doctor --student PATH --teacher PATH --data FILE --json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenkit.cli import run
from tokenkit.config import ALIASES, TrainConfig, parse_command_line
from tokenkit.config.command_line import take_own
from tokenkit.errors import at_least

if TYPE_CHECKING:
    from tokenkit.training.doctor.findings import Findings

USAGE = """usage: tokenkit doctor [--documents N] [--no-weights] [--json] [OPTIONS]

List all that would stop a training, or quietly spoil it, with what to change: vocabularies, special tokens,
templates, a sample of the data, models, disk, versions. Models are loaded as the training loads them. Nothing
is written. Exit code: 0 nothing would stop it, else that with which it would end (64, 65, 70, 71, 74).

  --documents N   Documents of the data that are tokenized (default: 256).
  --no-weights    Read configurations and tokenizers of the models, not their weights.
  --json          Print the findings as JSON.

All further options are those of `tokenkit train` (--config FILE, --student, --teacher, --data, ...).
"""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What is asked beside the training."""

    documents: int = 256
    no_weights: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked before torch is loaded."""
        at_least("documents", self.documents, 1, 10**6)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: show(list(sys.argv[1:] if argv is None else argv)))


def show(arguments: list[str]) -> int:
    """Print what was found, and return the exit code that a training would end with.

    Raises:
        ConfigError: an option that is none, or a configuration that says nothing to examine.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    readers = {"documents": int, "no-weights": None, "json": None}
    values, rest = take_own(arguments, readers, "tokenkit doctor")
    options = DoctorOptions(**values)
    config = parse_command_line(
        TrainConfig, rest, program="tokenkit doctor", aliases=ALIASES, finds_paths=False
    )
    from tokenkit.training.doctor.examine import examine

    found = examine(config, documents=options.documents, weights=not options.no_weights)
    print(to_json(found) if options.json else table(found))
    return found.code


def to_json(found: Findings) -> str:
    """Return the findings as JSON."""
    listed = [dataclasses.asdict(one) for one in found.sorted()]
    return json.dumps({"code": found.code, "checked": found.checked, "findings": listed}, indent=1)


def table(found: Findings) -> str:
    """Return the findings in lines, the worst first."""
    from tokenkit.training.doctor.findings import many

    lines = []
    for one in found.sorted():
        says = one.says.replace("\n", "\n" + " " * 20)
        lines.append(f"{one.severity:<8} {one.check:<10} {says}")
        if one.do:
            lines.append(" " * 20 + f"-> {one.do}")
    number = {kind: sum(one.severity == kind for one in found.found) for kind in ("error", "warning", "note")}
    counts = ", ".join(many(count, kind) for kind, count in number.items())
    end = f"a run would end with {found.code}" if found.code else "nothing here would stop a run"
    return "\n".join([*lines, f"{counts}: {end}"])


if __name__ == "__main__":
    raise SystemExit(main())
