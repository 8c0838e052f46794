"""How losses are named: the record that the trainer reads, names with aliases, and a user's own function."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenkit.losses.score import scored_tokens
from tokenkit.structs import Batch, ChunkKind, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss as the trainer sees it."""

    prepare: Callable[[HiddenStates | None, Batch, Any], Any]
    """(teacher, batch, options) -> an object with `.count`; no gradient, O(tokens)."""
    function: Callable[[HiddenStates, Any, Batch, Any], LossTerm]
    """(student, prepared, batch, options) -> LossTerm."""
    options: Callable[..., Any]
    """Makes the options of keyword arguments."""
    chunks: ChunkKind | None
    """The chunks it reads."""
    needs_teacher: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OwnPrepared:
    """What the first half of a user's loss keeps for the second."""

    count: Tensor
    teacher: HiddenStates | None


def find(name: str, losses: dict[str, Loss]) -> Loss:
    """Look a name or alias up; ValueError names the valid ones and the nearest."""
    for known, loss in losses.items():
        if name == known or name in loss.aliases:
            return loss
    names = [x for known, loss in losses.items() for x in (known, *loss.aliases)]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown loss {name!r}: expected one of {', '.join(names)}, or module:function{hint}")


def load_own(name: str) -> Loss:
    """Import `module:function` and make a `Loss` of it; see `tokenkit.losses.resolve`."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"loss {name!r}: no module {error.name!r}; it must be importable, by PYTHONPATH for example"
        ) from error
    own = getattr(module, function_name, None)
    if not callable(own):
        raise ValueError(f"loss {name!r}: {module_name} has no function {function_name!r}")

    def prepare(teacher: HiddenStates | None, batch: Batch, options: Any) -> OwnPrepared:
        count = getattr(own, "count", None)
        if count is None:
            return OwnPrepared(scored_tokens(batch.student).sum(), teacher)
        return OwnPrepared(count(teacher, batch), teacher)

    def function(student: HiddenStates, prepared: OwnPrepared, batch: Batch, options: Any) -> LossTerm:
        return own(student, prepared.teacher, batch)

    return Loss(
        prepare,
        function,
        options=_no_options,
        chunks=getattr(own, "chunks", "unconstrained"),
        needs_teacher=getattr(own, "needs_teacher", True),
    )


def _no_options(**_: Any) -> None:
    return None
