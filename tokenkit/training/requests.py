"""What `Distillation` can be asked for: weights are read in the forward of the module that owns them.

    prepared = ask(model, TeacherHalf(batch))        # no gradient: what is counted, before the first backward
    terms = ask(model, StudentHalf(batch, prepared))

`is_prefix` asks for the stage that runs the first layers alone, whose only loss is PREFIX. `teacher_halves`
and `step_counts` are what a whole optimizer step asks for before its first backward, in whatever loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from tokenkit.kernels.head.side import side_of
from tokenkit.kernels.head.tiles import Buffer
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.structs import Batch, HiddenStates, LossTerm

PREFIX = "prefix"
"""The loss of a prefix stage, and its phase in metrics.jsonl."""

Answer = TypeVar("Answer")
Reduce = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Adds tensors up over processes, by name."""


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

    def answer(self, states: HiddenStates) -> tuple[Tensor, Tensor]:
        """Read it off the student's states."""
        found = linear_logprob(states.hidden_BTD[self.at_N], states.head, self.target_N)
        return found.logp_N, found.is_top1_N


@dataclass(frozen=True, slots=True)
class NextToken(Request[Tensor]):
    """The student's logits of the token behind each text, float32 [B, V], padding rows left out."""

    ids_BT: Tensor
    """Padded on the right."""
    last_B: Tensor
    """int64, position of each text's last token."""

    def answer(self, states: HiddenStates) -> Tensor:
        """Read it off the student's states."""
        hidden_BD = states.hidden_BTD[torch.arange(len(self.last_B), device=self.last_B.device), self.last_B]
        side = side_of("hidden_BD", hidden_BD, states.head)
        z_BV, factor = side.logits(Buffer(hidden_BD), slice(0, len(hidden_BD)))
        return z_BV * factor


@dataclass(frozen=True, slots=True)
class WrittenRows(Request["list[Tensor] | None"]):
    """What the student's projector writes; None where it has none."""


def ask(model: nn.Module, request: Request[Answer]) -> Answer:
    """Call the module, through whatever hooks it has, and return what the request promises."""
    return cast(Answer, model(request))


def teacher_halves(
    model: nn.Module, batches: Sequence[Batch], reduce: Reduce, *, is_prefix: bool = False
) -> list[dict[str, Any]]:
    """Run the teacher's half of every micro-batch; where a loss measures a scale, all of them first.

    Args:
        model: a `Distillation`.
        batches: this process's micro-batches of an optimizer step.
        reduce: over all processes of the step.
        is_prefix: of the prefix stage.

    Returns:
        of each micro-batch, by loss, what `StudentHalf` takes, with its `.count`.
    """
    prepared = [ask(model, TeacherHalf(batch, is_prefix)) for batch in batches]
    names = cast(Any, model).measuring(is_prefix=is_prefix)
    if not names:
        return prepared
    sums = reduce({name: torch.stack([one[name].sum_K for one in prepared]).sum(0) for name in names})
    measured = [{name: (one[name], sums[name]) for name in names} for one in prepared]
    settled = [ask(model, Settle(batch, m, is_prefix)) for batch, m in zip(batches, measured, strict=True)]
    return [before | after for before, after in zip(prepared, settled, strict=True)]


def step_counts(
    prepared: Sequence[Mapping[str, Any]], names: Sequence[str], reduce: Reduce
) -> dict[str, Tensor]:
    """Return, by loss, the count of the whole optimizer step, float64: all micro-batches, all processes."""
    return reduce(
        {
            name: torch.stack([torch.as_tensor(one[name].count).double() for one in prepared]).sum(0)
            for name in names
        }
    )
