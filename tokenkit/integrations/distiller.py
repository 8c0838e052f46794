"""The losses of a distillation inside another trainer's step: teacher, counts of the whole step, weights.

    distiller = Distiller(model, teacher, collator, {"clm": 1, "alm_unconstrained": 100})
    prepared = distiller.prepare(model, micro_batches)                          # the teacher's half
    counts = distiller.counts(prepared)                                         # over all ranks
    for batch, half in zip(micro_batches, prepared):
        distiller.loss(model, batch, half, counts).total.backward()             # add up to one big batch's

`backward` does all of this for one optimizer step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations.forward import Wrapped, unwrapped
from tokenkit.integrations.whole_batches import real_rows
from tokenkit.losses import Loss, make_loss
from tokenkit.models.causal_lm import CausalLM, LoadOptions, load_causal_lm
from tokenkit.models.check import check_packing, settle
from tokenkit.structs import Batch, LossTerm
from tokenkit.training.distillation import Distillation
from tokenkit.training.pair import Pair
from tokenkit.training.requests import Reduce, StudentHalf, ask, step_counts, teacher_halves

Counts = dict[str, Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By Accelerate's word for it."""


class Weighted(NamedTuple):
    """A micro-batch's part of the loss of a whole step."""

    total: Tensor
    """Differentiable: Σ weight · total / count of the step."""
    parts: dict[str, Tensor]
    """By loss, this micro-batch's share, unweighted, without gradient."""


class Distiller:
    """What a trainer needs for cross-tokenizer distillation beside its own loop.

    The teacher belongs to this object alone: a trainer neither trains nor saves it.

    Args:
        student: the model that is trained, plain; it may be wrapped afterwards.
        teacher: a Hugging Face model, or the folder or name of one; not run where no loss compares with it.
        collator: makes the batches. Chunks that a loss reads and it does not make are added to it.
        losses: weight of each loss, by name; see docs/losses.md.
        options: keyword arguments of a loss, by name. Pairs of tokens and projections that an option asks
            for are made from the tokenizers.
        compute_dtype: autocast to this type; None: as the models are, or as the trainer autocasts.

    Raises:
        ValueError: an unknown loss or option, a weight that is not finite, a tokenizer with more ids than its
            model has rows, a model whose head is not known, one that does not keep packed documents apart.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        collator: AlignedCollator,
        losses: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        compute_dtype: torch.dtype | None = None,
    ):
        if not isinstance(collator, AlignedCollator):
            raise TypeError(f"the collator must be an AlignedCollator: got {type(collator).__name__}")
        self.weights = checked_weights(losses)
        tokenizers = collator.student_tokenizer, collator.teacher_tokenizer or collator.student_tokenizer
        device = next(student.parameters()).device
        active = active_losses(self.weights, options or {}, collator, device)
        self.collator = collator
        self.student = Wrapped(student, tokenizers[0].vocab_size)
        self.teacher = load_teacher(teacher, tokenizers[1].vocab_size, device)
        if collator.pack_documents:
            check_apart(self.student)
            check_apart(self.teacher)
        self.step = Distillation(self.student, self.teacher, active, compute_dtype)
        self.parts = self.step.parts.to(device)
        self.template = collator.collate([])

    def to(self, device: torch.device) -> Distiller:
        """Move the teacher, and what losses hold, to where the student went."""
        self.teacher.to(device)
        self.parts.to(device)
        self.step.losses = {name: loss.to(device) for name, loss in self.step.losses.items()}
        return self

    def prepare(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> list[dict[str, Any]]:
        """Run the teacher's half on every micro-batch of an optimizer step; each value has a `.count`.

        Args:
            model: as its trainer calls it.
            batches: the micro-batches of this process: the scales that `alm_latents` and `baseline_dskd`
                divide by are those of the whole step.
            reduce: sums a tensor over processes; None: over all of torch.distributed, where it runs.
        """
        with self.student.through(model):
            return teacher_halves(self.step, batches, in_one_call(reduce))

    def counts(
        self, prepared: Sequence[Mapping[str, Any]], reduce: Callable[[Tensor], Tensor] | None = None
    ) -> Counts:
        """Return, by loss, the count of the whole optimizer step.

        Args:
            prepared: of every micro-batch of this process.
            reduce: sums a tensor over processes; None: over all of torch.distributed, where it runs.
        """
        return step_counts(prepared, list(self.weights), in_one_call(reduce))

    def loss(self, model: nn.Module, batch: Batch, prepared: Mapping[str, Any], counts: Counts) -> Weighted:
        """Return one micro-batch's part of the step's loss; those of all micro-batches add up to it."""
        with self.student.through(model):
            terms = ask(self.step, StudentHalf(batch, prepared))
        parts = {name: (term.total / counts[name].clamp_min(1)).mean() for name, term in terms.items()}
        return Weighted(self.weigh(parts), {name: part.detach() for name, part in parts.items()})

    def weigh(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of losses by name."""
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()

    @torch.no_grad()
    def sums(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Return, by loss, what one batch adds up for an evaluation."""
        (prepared,) = self.prepare(model, [batch], reduce=lambda sums: sums)
        with self.student.through(model):
            return ask(self.step, StudentHalf(batch, prepared))

    def evaluate(self, batches: Sequence[Mapping[str, LossTerm]]) -> dict[str, float]:
        """Return each loss over all batches of all processes, divided once, and "loss", their sum.

        Raises:
            ValueError: no batches.
        """
        if not batches:
            raise ValueError(
                "there is nothing to evaluate: batches must hold what `sums` returned for at least one batch"
            )
        packed = []
        for name in self.weights:
            totals = [batch[name].total.double().reshape(-1) for batch in batches]
            counts = [batch[name].count.double().expand(len(totals[0])) for batch in batches]
            packed.append(torch.stack([torch.stack(totals).sum(0), torch.stack(counts).sum(0)]))
        summed = _sum_over_ranks(torch.cat(packed, 1)).split([part.shape[1] for part in packed], 1)
        parts = {
            name: (total / count.clamp_min(1)).mean()
            for name, (total, count) in zip(self.weights, summed, strict=True)
        }
        return {"loss": float(self.weigh(parts)), **{name: float(part) for name, part in parts.items()}}

    def average_parts(self, is_last: Callable[[], bool]) -> None:
        """Average the gradients of what losses train beside the model, as DDP does those of the model.

        Args:
            is_last: whether the backward that runs is that of the step's last micro-batch.
        """

        def average(parameter: Tensor) -> None:
            if is_last() and parameter.grad is not None:
                parameter.grad.copy_(_sum_over_ranks(parameter.grad) / _world_size())

        for parameter in self.parts.parameters():
            if _world_size() > 1:
                torch.distributed.broadcast(parameter.data, 0)
            parameter.register_post_accumulate_grad_hook(average)

    def backward(
        self,
        model: nn.Module,
        batches: Sequence[Batch | Mapping[str, Tensor]],
        *,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, float]:
        """Run forward and backward of a whole optimizer step; gradients are those of one big batch.

        Args:
            model: as its trainer calls it; its wrapper averages gradients over ranks, as DDP and FSDP2 do.
            batches: the micro-batches of this process, at least one.
            backward: `accelerator.backward`, `self.manual_backward`, ...
            no_sync: entered for every micro-batch but the last: `model.no_sync`.

        Returns:
            by loss its value over the whole step, in nats; "loss": their weighted sum.
        """
        device = next(model.parameters()).device
        taken = [self.batch(batch).to(device) for batch in batches]
        prepared = self.prepare(model, taken)
        counts, world = self.counts(prepared), _world_size()
        sums: list[Tensor] = []
        for i, (batch, half) in enumerate(zip(taken, prepared, strict=True)):
            with nullcontext() if i == len(taken) - 1 else no_sync():
                part = self.loss(model, batch, half, counts)
                backward(part.total * world)
            sums.append(torch.stack(list(part.parts.values())).double())
        values = _sum_over_ranks(torch.stack(sums).sum(0)).tolist()
        named = dict(zip(self.weights, values, strict=True))
        return {"loss": sum(self.weights[name] * value for name, value in named.items()), **named}

    def batch(self, batch: Batch | Mapping[str, Tensor]) -> Batch:
        """Return what a trainer carried as flat tensors (`dict(batch)`) as a batch."""
        return batch if isinstance(batch, Batch) else Batch.from_tensors(batch, self.template)


class FlatCollator:
    """A `collate_fn` of flat tensors, which every trainer can move, slice and count.

    Args:
        collator: makes the batches.

    Raises:
        ValueError: it packs documents, and flat tensors have a row for each.
    """

    def __init__(self, collator: AlignedCollator):
        if collator.pack_documents:
            raise ValueError(
                "pack_documents would do nothing here: this trainer moves flat tensors, a row for each "
                "document; set it to false, or pass the collator's batches on as they are"
            )
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return `dict(batch)`; one micro-batch of many may well have nothing to train on."""
        return dict(self.collator.collate(real_rows(rows)))


def check_apart(model: CausalLM) -> None:
    """Raise ValueError where documents of one row see each other in a model; see `check_packing`."""
    is_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        check_packing(model, 2, "pack_documents")
    finally:
        for module, was_training in is_training.items():
            module.training = was_training


def load_teacher(teacher: Any, vocab_size: int, device: torch.device) -> CausalLM:
    """Return a frozen teacher, of a model or of the folder or name of one, checked against its own logits."""
    if isinstance(teacher, str | os.PathLike):
        loaded = load_causal_lm(os.fspath(teacher), vocab_size, LoadOptions(dtype="auto"))
    else:
        loaded = CausalLM(unwrapped(teacher), vocab_size).eval()
        settle(loaded, "the teacher")
    loaded.requires_grad_(False).eval().to(device)
    return loaded


def checked_weights(losses: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of losses as floats; ValueError where one cannot be meant."""
    if not isinstance(losses, Mapping) or not losses:
        raise ValueError(f'losses must give a weight by name, such as {{"clm": 1.0}}: got {losses!r}')
    weights = {name: float(weight) for name, weight in losses.items()}
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of {name} must be positive and finite: got {weight}")
    return weights


def active_losses(
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]],
    collator: AlignedCollator,
    device: torch.device,
) -> dict[str, Loss[Any]]:
    """Look the losses up, give each its options, and let the collator make the chunks that they read."""
    if unknown := sorted(set(options) - set(weights)):
        raise ValueError(
            f"options of {', '.join(unknown)}, which is not among the losses {', '.join(weights)}"
        )
    tokenizers = collator.student_tokenizer, collator.teacher_tokenizer or collator.student_tokenizer
    active = {name: make_loss(name, Pair(*tokenizers, device), **options.get(name, {})) for name in weights}
    kinds = {loss.chunks for loss in active.values() if loss.chunks is not None}
    collator.chunk_kinds = tuple(dict.fromkeys((*collator.chunk_kinds, *sorted(kinds))))
    return active


def in_one_call(reduce: Callable[[Tensor], Tensor] | None) -> Reduce:
    """Return what reduces tensors by name in one call of `reduce`; None: over all of torch.distributed."""

    def summed(local: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = (reduce or _sum_over_ranks)(torch.cat([one.reshape(-1) for one in local.values()]))
        parts = packed.split([one.numel() for one in local.values()])
        return {name: part.reshape(local[name].shape) for name, part in zip(local, parts, strict=True)}

    return summed


def _sum_over_ranks(value: Tensor) -> Tensor:
    if _world_size() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
