"""What a loss is, a class with two methods over its options, and how one is made from its name.

A step needs the count of all its micro-batches and ranks before the first backward, so a loss has two
halves: `prepare` sees teacher and batch, `loss` the student. `Measured` losses divide by a scale of the
teacher's that is the whole step's too: theirs is a first half in two.
`make_loss` takes a name of `options.LOSSES`, or a user's own function as `module:function`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from tokenkit.kernels.projected_divergence import Projection
from tokenkit.losses.logprobs import LogprobRequest
from tokenkit.losses.options import find
from tokenkit.losses.score import check_states, scored_tokens
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, HiddenStates, LossTerm, StateKind, Widths

P = ParamSpec("P")
T = TypeVar("T")
O = TypeVar("O")  # noqa: E741 -- options


def without_gradient(method: Callable[P, T]) -> Callable[P, T]:
    """Run a method under `no_grad`. Unlike `torch.no_grad()` on a method, `torch.compile` can follow this."""

    @functools.wraps(method)
    def inner(*args: P.args, **keywords: P.kwargs) -> T:
        with torch.no_grad():
            return method(*args, **keywords)

    return inner


class Pair(Protocol):
    """Two tokenizers, and what is found of them when a loss asks. Ids are int64 [P], by side."""

    def matching(self) -> dict[str, Tensor]:
        """Tokens of the same bytes or role: `student_index` and `teacher_index`."""
        ...

    def unbiased(self, threshold: float) -> dict[str, Tensor]:
        """Of these, those with tokenisation biases of at most `threshold`."""
        ...

    def nearest(self) -> dict[str, Tensor]:
        """Tokens that a mined mapping pairs, each teacher id once."""
        ...

    def published(self) -> dict[str, Tensor]:
        """Tokens that TRL's GOLD takes for the same."""
        ...

    def mapping(self) -> Tensor:
        """A mined teacher id for each student id, int64 [V]."""
        ...

    def projection(self) -> Projection:
        """Which of the teacher's tokens each student token goes to."""
        ...

    def are_one(self) -> bool:
        """Whether both sides have the same tokenizer."""
        ...


class Loss(Generic[O]):
    """One loss of a run.

    Args:
        options: what a user may choose.
    """

    needs_teacher: ClassVar[bool] = True
    reads_teacher_head: ClassVar[bool] = False
    """`loss` reads `context.teacher_head`; where no loss does, it is freed before the student runs."""

    def __init__(self, options: O):
        self.options = options

    @classmethod
    def resources(cls, options: O, pair: Pair) -> dict[str, Any]:
        """Return what `__init__` takes beside the options, as two tokenizers give it."""
        return {}

    @property
    def chunks(self) -> ChunkKind | None:
        """The chunks that it reads."""
        return cast("ChunkKind | None", getattr(self.options, "chunks", None))

    @property
    def states(self) -> frozenset[StateKind]:
        """What the models must collect beside their last hidden states."""
        return frozenset()

    def modules(self, student: Widths, teacher: Widths) -> nn.Module | None:
        """Return trained parts, or None. No parameter may be a scalar."""
        return None

    def prepare(self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT) -> Any:
        """Return an object with `.count`, and whatever of the teacher `loss` needs; no gradient."""
        raise NotImplementedError

    def loss(
        self, student: HiddenStates, prepared: Any, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the sum over what was counted, differentiable in the student."""
        raise NotImplementedError

    def teacher_request(self, batch: Batch) -> LogprobRequest | None:
        """Return what `prepare` must know of the teacher's head: it finds the answer in its context.

        A step asks the head once for all losses; without an answer there the loss asks by itself.
        """
        return None

    def student_request(self, prepared: Any) -> LogprobRequest | None:
        """Return what `loss` must know of the student's head, likewise."""
        return None

    def to(self, device: torch.device) -> Loss[O]:
        """Return the same loss with its tensors on `device`."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if hasattr(value, "to"):
                setattr(moved, name, value.to(device))
        return moved

    def __call__(
        self,
        student: HiddenStates,
        teacher: HiddenStates | None,
        batch: Batch,
        modules: nn.Module | None = None,
    ) -> LossTerm:
        """Run both halves of a batch that is the whole step: what a drop-in form does.

        Returns:
            total; count, at least 1 so that `total / count` is 0 in a batch with nothing to compare.
        """
        check_states(student, "student")
        head = None
        if teacher is not None:
            check_states(teacher, "teacher")
            head = teacher.head
        context = Context(head, student.head, student.embedded_BTD, modules)
        prepared = self.prepare(teacher, batch, context)
        term = self.loss(student, prepared, batch, context)
        return LossTerm(term.total, term.count.clamp_min(1))


class Measured(Loss[O]):
    """A loss that divides by a scale of the whole step before it can count."""

    def measure(self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT) -> Any:
        """Return an object with `.sum_K`, float64 sums of this micro-batch, and what `settle` needs."""
        raise NotImplementedError

    def settle(self, measured: Any, sum_K: Tensor, batch: Batch, context: Context = NO_CONTEXT) -> Any:
        """Return what `prepare` would.

        Args:
            measured: of this micro-batch.
            sum_K: float64, of all micro-batches on all ranks.
            batch: this micro-batch.
            context: as in the other halves.
        """
        raise NotImplementedError

    def prepare(self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT) -> Any:
        """Measure and settle where this batch is the whole step."""
        measured = self.measure(teacher, batch, context)
        return self.settle(measured, measured.sum_K, batch, context)


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
        self.reads_teacher_head = self.needs_teacher  # type: ignore[misc]

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
