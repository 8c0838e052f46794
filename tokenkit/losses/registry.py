"""How losses are named: the record that the trainer reads, names with aliases, and a user's own function."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tokenkit.losses.score import check_states, scored_tokens
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, HiddenStates, LossTerm, StateKind, Widths

Prepare = Callable[[HiddenStates | None, Batch, Any, Context], Any]
Function = Callable[[HiddenStates, Any, Batch, Any, Context], LossTerm]
Settle = Callable[[Any, Tensor, Batch, Any, Context], Any]


def _asks_for_nothing(options: Any) -> frozenset[StateKind]:
    return frozenset()


def _has_no_modules(options: Any, student: Widths, teacher: Widths) -> nn.Module | None:
    return None


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss as the trainer sees it."""

    prepare: Prepare
    """(teacher, batch, options, context) -> an object with `.count`; no gradient, O(tokens)."""
    function: Function
    """(student, prepared, batch, options, context) -> LossTerm."""
    options: Callable[..., Any]
    """Makes the options of keyword arguments."""
    chunks: ChunkKind | None
    """The chunks it reads, where its options do not say."""
    needs_teacher: bool = True
    aliases: tuple[str, ...] = ()
    states: Callable[[Any], frozenset[StateKind]] = _asks_for_nothing
    """(options) -> what the models must collect beside their last hidden states."""
    modules: Callable[[Any, Widths, Widths], nn.Module | None] = _has_no_modules
    """(options, student's, teacher's) -> trained parts, or None. No parameter may be a scalar."""
    measure: Prepare | None = None
    """Where a scale of the whole step comes before the count: like `prepare`, but returns an object with
    `.sum_K`, float64 sums of this micro-batch, and whatever `settle` needs. `prepare` is both in one, for a
    step of one micro-batch."""
    settle: Settle | None = None
    """(measured, sum_K of the whole step, batch, options, context) -> what `prepare` returns."""

    def chunks_with(self, options: Any) -> ChunkKind | None:
        """Return the chunks that the loss reads under these options."""
        return getattr(options, "chunks", self.chunks)


def whole(
    loss: Loss,
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    options: Any,
    modules: nn.Module | None = None,
) -> LossTerm:
    """Run both halves of a loss: what its drop-in form does.

    Returns:
        total, nats; count, at least 1 so that `total / count` is 0 in a batch with nothing to compare.
    """
    check_states(student, "student")
    check_states(teacher, "teacher")
    context = Context(teacher.head, student.head, student.embedded_BTD, modules)
    prepared = loss.prepare(teacher, batch, options, context)
    term = loss.function(student, prepared, batch, options, context)
    return LossTerm(term.total, term.count.clamp_min(1))


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

    def prepare(
        teacher: HiddenStates | None, batch: Batch, options: Any, context: Context = NO_CONTEXT
    ) -> OwnPrepared:
        count = getattr(own, "count", None)
        if count is None:
            return OwnPrepared(scored_tokens(batch.student).sum(), teacher)
        return OwnPrepared(count(teacher, batch), teacher)

    def function(
        student: HiddenStates,
        prepared: OwnPrepared,
        batch: Batch,
        options: Any,
        context: Context = NO_CONTEXT,
    ) -> LossTerm:
        teacher = prepared.teacher
        if teacher is not None and context.teacher_head is not None:
            teacher = replace(teacher, head=context.teacher_head)
        return own(student, teacher, batch)

    return Loss(
        prepare,
        function,
        options=_no_options,
        chunks=getattr(own, "chunks", "unconstrained"),
        needs_teacher=getattr(own, "needs_teacher", True),
    )


def _no_options(**_: Any) -> None:
    return None
