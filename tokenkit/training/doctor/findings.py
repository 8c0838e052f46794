"""What a check says: how bad it is, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from tokenkit.errors import exit_code

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know."""

    severity: Severity
    """error: a run ends with it; warning: it runs, and what comes out may not be what was meant; note: to
    know."""
    check: str
    """Which of `CHECKS` found it."""
    says: str
    do: str = ""
    """What to change; empty where `says` names it, or where nothing needs to be changed."""
    code: int = 0
    """Exit code of the run that it stops."""


CHECKS = {
    "config": "what the training itself refuses: losses, batch, tasks",
    "tokenizers": "each can be loaded, and is its model's own",
    "vocabulary": "each id's bytes, against the tokenizers library and back through the tokenizer",
    "special": "padding, ends and begins of documents",
    "pair": "one tokenizer on both sides, BOS on one side, templates",
    "data": "a sample, tokenized as the training does it: rows left out, trained tokens, lengths, padding",
    "models": "configurations against tokenizers: rows, positions, ends; then weights, as training does",
    "disk": "output folder, and room for checkpoints and export",
    "machine": "versions, GPUs, memory, fast attention and fused kernels",
}
"""Name: what it looks at."""


def many(count: int, what: str) -> str:
    """Return `1 document`, `2 documents`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@dataclass
class Findings:
    """The list that all checks fill."""

    found: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    """Names of the checks that were made, in order."""

    def error(self, check: str, says: str, do: str = "", *, code: int = 64) -> None:
        """Add what stops a run, with the exit code that it would have."""
        self.found.append(Finding("error", check, says, do, code))

    def warning(self, check: str, says: str, do: str = "") -> None:
        """Add what a run survives and should not have."""
        self.found.append(Finding("warning", check, says, do))

    def note(self, check: str, says: str, do: str = "") -> None:
        """Add what is good to know."""
        self.found.append(Finding("note", check, says, do))

    @contextmanager
    def trying(self, check: str) -> Iterator[None]:
        """Add what the block raises, in the words and with the exit code that it has in a training.

        Errors that name no remedy are faults of tokenkit, and pass.
        """
        if check not in self.checked:
            self.checked.append(check)
        try:
            yield
        except Exception as error:
            if exit_code(error) == 1 and not getattr(error, "is_told", False):
                raise
            says = " ".join(str(error).split()) or type(error).__name__
            if all(says not in one.says for one in self.found):  # two checks may meet the same fault
                self.error(check, says, code=exit_code(error))

    @property
    def code(self) -> int:
        """0, or how a run would end: the exit code of the first error."""
        return next((one.code for one in self.found if one.severity == "error"), 0)

    def sorted(self) -> list[Finding]:
        """Return errors, then warnings, then notes."""
        order: Sequence[Severity] = ("error", "warning", "note")
        return sorted(self.found, key=lambda one: order.index(one.severity))
