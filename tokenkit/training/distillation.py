"""Teacher, student and losses as one module: the root that FSDP2 shards.

A head's weight read outside the forward of the module that owns it is silently wrong under FSDP2, so
both bodies and all losses run inside this forward. A step calls it twice per micro-batch: once for the
teacher's half, whose counts every rank must know before the first backward, and once for the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenkit.losses import Loss, clm_loss
from tokenkit.models.causal_lm import CausalLM, Vocabulary
from tokenkit.models.lora import as_teacher
from tokenkit.structs import Batch, HiddenStates, LossTerm

Half = Literal["teacher", "student", "evaluate"]


@dataclass(frozen=True, slots=True)
class ActiveLoss:
    """A loss of this run: its name, its two halves and their options."""

    name: str
    loss: Loss
    options: Any


class Distillation(nn.Module):
    """Run both models on a batch and return what the losses add up.

    Args:
        student: the model that is trained.
        teacher: another model, or the old vocabulary of the student, whose body then serves both.
        losses: in the order in which they are reported.
        compute_dtype: autocast to this type (one process); None: as the parameters are.
    """

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM | Vocabulary,
        losses: Sequence[ActiveLoss],
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.losses = list(losses)
        self.compute_dtype = compute_dtype

    def train(self, mode: bool = True) -> Distillation:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, half: Half, prepared: dict[str, Any] | None = None) -> Any:
        """Run one half of a step.

        Args:
            batch: on this module's device.
            half: "teacher" returns, by loss, what the student's half needs, with its `.count`;
                "student" returns, by loss, a `LossTerm`; "evaluate" returns a float32 [2] tensor: the nats
                of the trained tokens under student and teacher.
            prepared: what the teacher's half returned for this batch.
        """
        if half == "teacher":
            return self._teacher_half(batch)
        if half == "evaluate":
            return self._evaluate(batch)
        assert prepared is not None
        return self._student_half(batch, prepared)

    @torch.no_grad()
    def _teacher_half(self, batch: Batch) -> dict[str, Any]:
        needed = any(active.loss.needs_teacher for active in self.losses)
        states = self._teacher_states(batch) if needed else None
        return {active.name: active.loss.prepare(states, batch, active.options) for active in self.losses}

    def _student_half(self, batch: Batch, prepared: dict[str, Any]) -> dict[str, LossTerm]:
        states = self._student_states(batch)
        return {
            active.name: active.loss.function(states, prepared[active.name], batch, active.options)
            for active in self.losses
        }

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> Tensor:
        student = clm_loss(self._student_states(batch), batch)
        swapped = replace(batch, student=batch.teacher)
        teacher = clm_loss(self._teacher_states(batch), swapped)
        return torch.stack([student.total, teacher.total])

    def _student_states(self, batch: Batch) -> HiddenStates:
        with self._autocast(batch):
            states = self.student(batch.student.ids_BT)
        return self._in_compute_dtype(states)

    def _teacher_states(self, batch: Batch) -> HiddenStates:
        ids_BS = batch.teacher.ids_BT
        with self._autocast(batch):
            if isinstance(self.teacher, Vocabulary):
                with as_teacher(self.student):
                    states = self.student(ids_BS, self.teacher)
            else:
                states = self.teacher(ids_BS)
        return self._in_compute_dtype(states)

    def _autocast(self, batch: Batch) -> AbstractContextManager[Any]:
        if self.compute_dtype in (None, torch.float32):
            return nullcontext()
        return torch.autocast(batch.student.ids_BT.device.type, dtype=self.compute_dtype)

    def _in_compute_dtype(self, states: HiddenStates) -> HiddenStates:
        """Cast hidden states and head to one type: the kernels multiply like with like."""
        dtype = self.compute_dtype or states.hidden_BTD.dtype
        head = states.head
        bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
        return replace(
            states,
            hidden_BTD=states.hidden_BTD.to(dtype),
            head=replace(head, weight_VD=head.weight_VD.to(dtype), bias_V=bias_V),
        )
