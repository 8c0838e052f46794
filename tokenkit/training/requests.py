"""What `Distillation` can be asked for: weights are read in the forward of the module that owns them.

    prepared = ask(model, TeacherHalf(batch))        # no gradient: what is counted, before the first backward
    terms = ask(model, StudentHalf(batch, prepared))

`is_prefix` asks for the stage that runs the first layers alone, whose only loss is PREFIX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from tokenkit.structs import Batch, LossTerm

PREFIX = "prefix"
"""The loss of a prefix stage, and its phase in metrics.jsonl."""

Answer = TypeVar("Answer")


class Request(Generic[Answer]):
    """Something that a `Distillation` answers."""


@dataclass(frozen=True, slots=True)
class TeacherHalf(Request[dict[str, Any]]):
    """By loss, what the student's half needs, with its `.count`; of a `Measured` loss, what it measured."""

    batch: Batch
    is_prefix: bool = False


@dataclass(frozen=True, slots=True)
class Settle(Request[dict[str, Any]]):
    """By loss that measured, what `TeacherHalf` gives for the others."""

    batch: Batch
    measured: Mapping[str, tuple[Any, Tensor]]
    """What was measured, and its sums over the whole step."""
    is_prefix: bool = False


@dataclass(frozen=True, slots=True)
class StudentHalf(Request[dict[str, LossTerm]]):
    """By loss, what it adds up, differentiable."""

    batch: Batch
    prepared: Mapping[str, Any]
    is_prefix: bool = False
    from_last_layer: bool = False
    """The graph begins at the student's last layer, and leaves the head out."""


@dataclass(frozen=True, slots=True)
class Evaluate(Request[Tensor]):
    """float32 [2], the nats of the trained tokens under student and teacher; NaN where there is none."""

    batch: Batch
    rows: Sequence[Tensor] | None = None
    """What `WrittenRows` gave."""
    shares: tuple[Tensor, Tensor] | None = None
    """[B, T] and [B, S], what counts of each token's nats; None: all."""


@dataclass(frozen=True, slots=True)
class Score(Request[tuple[Tensor, Tensor]]):
    """The student's log p of each target, float32 [N], and whether no token is more likely, bool [N]."""

    ids_BT: Tensor
    at_N: tuple[Tensor, Tensor]
    """Row and position of the token before each target."""
    target_N: Tensor


@dataclass(frozen=True, slots=True)
class WrittenRows(Request["list[Tensor] | None"]):
    """What the student's projector writes; None where it has none."""


def ask(model: nn.Module, request: Request[Answer]) -> Answer:
    """Call the module, through whatever hooks it has, and return what the request promises."""
    return cast(Answer, model(request))
