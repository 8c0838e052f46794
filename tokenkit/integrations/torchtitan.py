"""Distillation in torchtitan: a loss of its shape, and what its `Trainer` needs to feed it.

    class Trainer(DistillsTitan, torchtitan.trainer.Trainer): ...

    loss = TitanLoss(teacher, collator, {"clm": 1, "alm_unconstrained": 100}, device)
    loss(hidden_states, labels, global_valid_tokens)  ->  (loss, metrics)

torchtitan's loss is called with what the model gives and with labels alone, and its step counts labels alone.
So the teacher's halves of a step run before it, and wait in the loss for the calls of its micro-batches.
The loader yields `Batch`es, of `collator.collate`. Nothing of torchtitan is imported here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations.distiller import active_losses, checked_weights, in_one_call, load_teacher
from tokenkit.integrations.forward import whole
from tokenkit.losses import Measured
from tokenkit.structs import NO_LABEL, Batch, Context, Head, HiddenStates
from tokenkit.training.requests import step_counts


class TitanLoss:
    """A loss of torchtitan's shape for models that skip their head (`_skip_lm_head`).

    The returned loss is this rank's part: its sum over ranks and micro-batches is the step's loss, which is
    what torchtitan's FSDP, dividing gradients by nothing, expects. Losses that read more than the last
    hidden states, or measure a whole step first, are refused.

    Args:
        teacher: a Hugging Face model, or the folder or name of one.
        collator: of both tokenizers.
        losses: weight of each loss, by name.
        device: where the teacher goes.
        options: keyword arguments of a loss, by name.
    """

    def __init__(
        self,
        teacher: nn.Module | str,
        collator: AlignedCollator,
        losses: Mapping[str, float],
        device: torch.device,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        tokenizers = collator.student_tokenizer, collator.teacher_tokenizer or collator.student_tokenizer
        self.weights, self.device, self.vocab_size = checked_weights(losses), device, tokenizers[0].vocab_size
        self.active = active_losses(self.weights, options or {}, collator, device)
        for name, loss in self.active.items():
            if loss.states or isinstance(loss, Measured):
                raise ValueError(
                    f"{name} reads more than the last hidden states, which are all there is here"
                )
        self.teacher = load_teacher(teacher, tokenizers[1].vocab_size, device)
        self.lm_head: Any = None
        self.counts: dict[str, Tensor] = {}
        self._waiting: deque[tuple[Batch, dict[str, Any]]] = deque()

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Set the head; called once, before the first step."""
        self.lm_head = lm_head

    @torch.no_grad()
    def begin(self, batches: Sequence[Batch], reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Run the teacher's half of a step's micro-batches, and take its counts over all ranks.

        Args:
            batches: of this rank, in the order of the calls.
            reduce: sums a tensor over the ranks that hold different data; None: over all.
        """
        self._waiting.clear()
        for batch in batches:
            moved = batch.to(self.device)
            states = self.teacher(moved.teacher.ids_BT)
            context = Context(teacher_head=states.head, student_head=self._head())
            half = {name: loss.prepare(states, moved, context) for name, loss in self.active.items()}
            self._waiting.append((moved, half))
        self.counts = step_counts(
            [half for _, half in self._waiting], list(self.weights), in_one_call(reduce)
        )

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one micro-batch's part of the loss, and each loss's part by name.

        Args:
            pred: hidden states [B, T, D].
            labels: int64 [B, T], of each position the token that follows: those of `titan_inputs`.
            global_valid_tokens: not used; losses are divided by their own counts.

        Raises:
            RuntimeError: no micro-batch waits, or the labels are another's.
        """
        if not self._waiting:
            raise RuntimeError("no micro-batch waits for this loss: call `begin` with all of a step's first")
        batch, half = self._waiting.popleft()
        if not torch.equal(labels, titan_inputs(batch)[1]):
            raise RuntimeError(
                "the labels are not those of the micro-batch whose turn it is: keep their order"
            )
        states = HiddenStates(pred, self._head())
        context = Context(teacher_head=self.teacher.head())
        parts = {}
        for name, loss in self.active.items():
            term = loss.loss(states, half[name], batch, context)
            parts[name] = (term.total / self.counts[name].clamp_min(1)).mean()
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _head(self) -> Head:
        assert self.lm_head is not None, "set_lm_head comes before the first step"
        bias_V = getattr(self.lm_head, "bias", None)
        return Head(
            whole(self.lm_head.weight, averaged=False),
            None if bias_V is None else whole(bias_V, averaged=False),
            vocab_size=self.vocab_size,
        )


def titan_inputs(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch as torchtitan's loader yields it: the student's ids, and the token after each."""
    tensors = batch.student.tensors()
    labels_BT = torch.nn.functional.pad(tensors["labels"][:, 1:], (0, 1), value=NO_LABEL)
    return {"input": tensors["input_ids"]}, labels_BT


class DistillsTitan:
    """What a torchtitan `Trainer` whose loss is a `TitanLoss` needs: mixed in before it."""

    loss_fn: Any
    model_parts: list[Any]
    gradient_accumulation_steps: int

    def train_step(self, data_iterator: Iterator[Batch]) -> Any:
        """Take one optimizer step over the next `gradient_accumulation_steps` batches."""
        if self.loss_fn.lm_head is None:
            (model,) = self.model_parts  # a pipeline's last stage would have the head
            self.loss_fn.set_lm_head(model.lm_head)
            model._skip_lm_head = True
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        self.loss_fn.begin(batches)
        return super().train_step(titan_inputs(batch) for batch in batches)  # type: ignore[misc]
