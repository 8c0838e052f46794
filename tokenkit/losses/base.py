"""What a loss is: a class with two methods over its options.

A step needs the count of all its micro-batches and ranks before the first backward, so a loss has two
halves: `prepare` sees teacher and batch, `loss` the student. `Measured` losses divide by a scale of the
teacher's that is the whole step's too: theirs is a first half in two.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Generic, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from tokenkit.kernels.projected_divergence import Projection
from tokenkit.losses.score import check_states
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
