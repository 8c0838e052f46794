"""From the name of a loss to the loss: those of the table, and a user's own function."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokenkit.losses.base import Loss, Pair
from tokenkit.losses.options import find
from tokenkit.losses.score import scored_tokens
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, HiddenStates, LossTerm


def make_loss(name: str, pair: Pair | None = None, **given: Any) -> Loss[Any]:
    """Return the loss of that name or alias, or a user's own, written `module:function`.

    A user's function takes (student, teacher, batch), two HiddenStates and a Batch, and returns a LossTerm.
    Its count must be known before the student runs: `function.count(teacher, batch)` where the function
    has that attribute, else the number of scored student tokens. Further attributes, each optional:
    `chunks` (the kind of chunks it reads; "unconstrained") and `needs_teacher` (True).

    Args:
        name: of `tokenkit.losses.options.LOSSES`.
        pair: finds what the loss needs of the two tokenizers and is not given.
        given: fields of the loss's options, and what its class takes beside them.

    Raises:
        ValueError: no loss of that name (the message names the valid ones and the nearest), nothing callable
            at module:function, an option that it does not have, or something of the pair that is missing.
    """
    if ":" in name:
        if given:
            raise ValueError(
                f"{name} is a function of one's own, which takes no options, and got {', '.join(given)}: set "
                "them in it"
            )
        return Own(name, _import(name))
    entry = find(name)
    if entry.one_tokenizer and pair is not None and not pair.are_one():
        raise ValueError(
            f"{name} compares student and teacher id by id, and their tokenizers differ: take an ALM loss or "
            "a baseline, or give both the same tokenizer"
        )
    module, _, kind_name = entry.place.partition(":")
    kind = getattr(importlib.import_module(f"tokenkit.losses.{module}"), kind_name)
    beside = {k: p for k, p in inspect.signature(kind).parameters.items() if k != "options"}
    fields = [field.name for field in dataclasses.fields(entry.options)]
    if wrong := sorted(set(given) - set(fields) - set(beside)):
        raise ValueError(f"{name} has no option {', '.join(wrong)}: it has {', '.join([*beside, *fields])}")
    options = entry.options(**(entry.fixed | {k: value for k, value in given.items() if k in fields}))
    held = {k: value for k, value in given.items() if k in beside}
    if pair is not None and set(held) != set(beside):
        held = kind.resources(options, pair) | held
    if missing := [k for k, p in beside.items() if p.default is p.empty and k not in held]:
        raise ValueError(f"{name} needs {', '.join(missing)}, which two tokenizers give: hand it over")
    loss: Loss[Any] = kind(options, **held)
    return loss


@dataclass(frozen=True, slots=True)
class OwnPrepared:
    """What the first half of a user's loss keeps for the second."""

    count: Tensor
    teacher: HiddenStates | None


class Own(Loss[None]):
    """A user's function as a loss."""

    def __init__(self, name: str, function: Callable[..., LossTerm]):
        super().__init__(None)
        self.name, self.function = name, function
        self.needs_teacher = getattr(function, "needs_teacher", True)  # type: ignore[misc]

    @property
    def chunks(self) -> ChunkKind | None:
        """The chunks that it reads."""
        return getattr(self.function, "chunks", "unconstrained")

    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> OwnPrepared:
        """Ask the function for its count."""
        count = getattr(self.function, "count", None)
        if count is None:
            return OwnPrepared(scored_tokens(batch.student).sum(), teacher)
        return OwnPrepared(count(teacher, batch), teacher)

    def loss(
        self, student: HiddenStates, prepared: OwnPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Call the function, with the teacher's head as it is now."""
        teacher = prepared.teacher
        if teacher is not None and context.teacher_head is not None:
            teacher = replace(teacher, head=context.teacher_head)
        term = self.function(student, teacher, batch)
        if not isinstance(term, LossTerm) or not isinstance(term.total, Tensor):
            raise ValueError(
                f"loss {self.name!r} must return LossTerm(total, count), a sum and how many things it sums "
                f"over: got {type(term).__name__}"
            )
        return term


def _import(name: str) -> Callable[..., LossTerm]:
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
    function: Callable[..., LossTerm] = own
    return function
