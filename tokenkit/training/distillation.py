"""Teacher, student and losses as one module: the root that FSDP2 shards.

A head's weight read outside the forward of the module that owns it is silently wrong under FSDP2, so
both bodies and all losses run inside this forward. A step calls it twice per micro-batch: once for the
teacher's half, whose counts every rank must know before the first backward, and once for the student's.
Where a loss divides by a scale of the whole step, a call between the two counts with that scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.losses import Loss, Measured
from tokenkit.losses.latents import Latents
from tokenkit.losses.logprobs import answer
from tokenkit.losses.score import in_dtype, token_nats
from tokenkit.models.causal_lm import CausalLM, OwnVocabulary, Rows, Vocabulary
from tokenkit.models.lora import as_teacher
from tokenkit.models.prefix import prefix_states
from tokenkit.parallel import gather, release
from tokenkit.structs import (
    NO_CONTEXT,
    Batch,
    Context,
    Head,
    HiddenStates,
    LossTerm,
    Scores,
    Side,
    StateKind,
)
from tokenkit.training.graphs import connected, graph_from, with_frozen_head
from tokenkit.training.requests import (
    PREFIX,
    Evaluate,
    NextToken,
    Request,
    Score,
    Settle,
    StudentHalf,
    TeacherHalf,
    WrittenRows,
)

TEACHER = "#teacher"
"""What the teacher's half returns beside the losses: 0, or NaN where its states are not finite."""


@dataclass(frozen=True, slots=True)
class PrefixOptions:
    """What the halves of the prefix stage run and compare."""

    n_layers: int
    latents: Latents
    """Hidden states after layer `n_layers` stand in for the last ones."""


class Distillation(nn.Module):
    """Run both models on a batch and return what the losses add up.

    Args:
        student: the model that is trained.
        teacher: another model, or the old vocabulary of the student, whose body then serves both; None where
            no loss has one.
        losses: by name, in the order in which they are reported.
        compute_dtype: autocast to this type, for trainers that do so; None: as the parameters are.
        prefix: of a run whose first stage runs the first layers alone.
    """

    parts: nn.ModuleDict
    """What losses train beside the student, by loss; never exported."""

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM | Vocabulary | None,
        losses: Mapping[str, Loss[Any]],
        compute_dtype: torch.dtype | None = None,
        prefix: PrefixOptions | None = None,
    ):
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.losses = dict(losses)
        self.compute_dtype = compute_dtype
        self.prefix = prefix
        self.collect = frozenset[StateKind]().union(*(loss.states for loss in losses.values()))
        self.reads_teacher_head = any(loss.reads_teacher_head for loss in losses.values())
        self.parts = self._make_parts()

    def train(self, mode: bool = True) -> Distillation:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, request: Request[Any]) -> Any:
        """Answer a request; see `requests` for what each is answered with."""
        self._gather(request)
        match request:
            case TeacherHalf(batch, is_prefix):
                return self._prefix_teacher(batch) if is_prefix else self._teacher_half(batch)
            case Settle(batch, measured, is_prefix):
                return self._settle(batch, measured, is_prefix=is_prefix)
            case StudentHalf(batch, prepared, is_prefix):
                return self._losses(self._states_for(request), batch, prepared, is_prefix=is_prefix)
            case Evaluate():
                return self._evaluate(request)
            case Score() | NextToken():
                return self._score(request)
            case WrittenRows():
                return self._rows()
        raise TypeError(f"no request: {type(request).__name__}")

    def _gather(self, request: Request[Any]) -> None:
        """Show the vocabularies that a request reads, and free the teacher's where the student runs without.

        The student's stays until the step's last backward, the teacher's from one micro-batch to the next.
        """
        gather(self.student)
        match request:
            case StudentHalf(_, _, is_prefix):
                if is_prefix or not self.reads_teacher_head:
                    release(self.teacher)
                else:
                    gather(self.teacher)
            case TeacherHalf(_, is_prefix) if is_prefix or self._needs_teacher:
                gather(self.teacher)
            case Evaluate():
                gather(self.teacher)

    @property
    def _needs_teacher(self) -> bool:
        return any(loss.needs_teacher for loss in self.losses.values())

    @property
    def last_layer(self) -> nn.Module:
        """The student's last transformer layer, where losses are compared."""
        return self.student.layers[-1]

    def losses_of(self, *, is_prefix: bool = False) -> dict[str, Loss[Any]]:
        """Return the losses of the main stage, or of the prefix stage."""
        if not is_prefix:
            return self.losses
        assert self.prefix is not None
        return {PREFIX: self.prefix.latents}

    def measuring(self, *, is_prefix: bool = False) -> list[str]:
        """Return the losses that divide by a scale of the whole step, to be known before they count."""
        losses = self.losses_of(is_prefix=is_prefix)
        return [name for name, loss in losses.items() if isinstance(loss, Measured)]

    @property
    def prefix_layers(self) -> list[nn.Module]:
        """The student's layers that the prefix stage runs."""
        assert self.prefix is not None
        return list(self.student.layers)[: self.prefix.n_layers]

    @torch.no_grad()
    def _teacher_half(self, batch: Batch) -> dict[str, Any]:
        states = self._teacher_states(batch, self.collect) if self._needs_teacher else None
        at_once = [loss for loss in self.losses.values() if not isinstance(loss, Measured)]
        context = self._teacher_context(batch, states, at_once)
        asked = {name: loss.teacher_request(batch) for name, loss in self.losses.items()}
        said = {} if states is None else answer(states, asked)
        prepared = {}
        for name, loss in self.losses.items():
            first = loss.measure if isinstance(loss, Measured) else loss.prepare
            around = replace(self._with_parts(context, name), scores=said.get(name))
            prepared[name] = first(states, batch, around)
        return prepared | {TEACHER: None if states is None else states.spoiled}

    @torch.no_grad()
    def _settle(
        self, batch: Batch, measured: Mapping[str, tuple[Any, Tensor]], *, is_prefix: bool
    ) -> dict[str, Any]:
        losses = self.losses_of(is_prefix=is_prefix).items()
        active = {n: loss for n, loss in losses if n in measured and isinstance(loss, Measured)}
        context = NO_CONTEXT if is_prefix else self._teacher_context(batch, None, list(active.values()))
        return {
            name: loss.settle(*measured[name], batch, self._with_parts(context, name))
            for name, loss in active.items()
        }

    def _teacher_context(
        self, batch: Batch, states: HiddenStates | None, readers: Sequence[Loss[Any]]
    ) -> Context:
        """Return what losses may read in the first half, with the student's rows if one of `readers` asks."""
        reads_rows = any("embedded" in loss.states for loss in readers)
        if reads_rows:
            own = self.student.own()
            student_head, embedded_BTD = own.head(), own.embedding(batch.student.ids_BT)
        else:  # a projector runs over the whole vocabulary: not for those who want to know its size
            student_head, embedded_BTD = self.student.held_head(), None
        if embedded_BTD is not None and self.compute_dtype is not None:
            embedded_BTD = embedded_BTD.to(self.compute_dtype)
        return Context(
            teacher_head=None if states is None else states.head,
            student_head=self._head(student_head, states),
            student_embedded_BTD=embedded_BTD,
        )

    def _losses(
        self, states: HiddenStates, batch: Batch, prepared: Mapping[str, Any], *, is_prefix: bool
    ) -> dict[str, LossTerm]:
        losses, context = self.losses_of(is_prefix=is_prefix), NO_CONTEXT
        if not is_prefix and self.teacher is not None and self.reads_teacher_head:
            # read here: what the teacher's half read is freed under FSDP2
            context = Context(teacher_head=self._head(self.teacher.head(), states))
        asked = {name: loss.student_request(prepared[name]) for name, loss in losses.items()}
        said: dict[str, Scores] | None = None
        with suppress(
            NotFiniteError
        ):  # the other ranks take part in the backward, and hear of it behind that
            said = answer(states, asked)
        terms = {}
        for name, loss in losses.items():
            ready, around = prepared[name], self._with_parts(context, name)
            try:
                if said is None and asked[name] is not None:
                    raise NotFiniteError
                around = replace(around, scores=(said or {}).get(name))
                term = loss.loss(states, ready, batch, around)
            except NotFiniteError:
                term = _nan_term(states.hidden_BTD, ready.count)
            terms[name] = _spoil(term, states.spoiled, prepared.get(TEACHER))
        inside = {name for name, loss in losses.items() if loss.states}
        terms = {
            name: connected(name, term, states, reads_layers=name in inside) for name, term in terms.items()
        }
        for term in terms.values():
            if term.total.requires_grad:  # a second backward comes behind the end of the first, which frees
                term.total.register_hook(self._gather_again)
        return terms

    def _gather_again(self, _: Tensor) -> None:
        gather(self.student)
        if self.reads_teacher_head:
            gather(self.teacher)

    def _make_parts(self) -> nn.ModuleDict:
        """Build what the losses train, from the widths of both models; in float32, as all that is trained."""
        student = self.student.widths()
        if isinstance(self.teacher, Vocabulary):
            teacher = self.student.widths(self.teacher)
        else:
            teacher = student if self.teacher is None else self.teacher.widths()
        made = {name: loss.modules(student, teacher) for name, loss in self.losses.items()}
        return nn.ModuleDict({name: module for name, module in made.items() if module is not None})

    def _with_parts(self, context: Context, name: str) -> Context:
        return replace(context, modules=dict(self.parts.items()).get(name))

    @torch.no_grad()
    def _rows(self) -> list[Tensor] | None:
        projector = self.student.projector
        return None if projector is None else projector(self.student.matrices())

    @torch.no_grad()
    def _evaluate(self, request: Evaluate) -> Tensor:
        batch = request.batch
        share_BT, share_BS = (None, None) if request.shares is None else request.shares
        own = None if request.rows is None else OwnVocabulary(self.student, request.rows)
        student = _nats(self._student_states(batch, own=own), batch.student, share_BT)
        if self.teacher is None:
            return torch.stack([student, torch.full_like(student, torch.nan)])
        teacher = _nats(self._teacher_states(batch), batch.teacher, share_BS)
        return torch.stack([student, teacher])

    @torch.no_grad()
    def _score(self, request: Score | NextToken) -> Any:
        with self._autocast(request.ids_BT):
            states = self.student(request.ids_BT)
        return request.answer(self._in_compute_dtype(states))

    @torch.no_grad()
    def _prefix_teacher(self, batch: Batch) -> dict[str, Any]:
        assert self.prefix is not None
        assert self.teacher is not None
        ids_BS, n_layers = batch.teacher.ids_BT, self.prefix.n_layers
        with self._autocast(batch.student.ids_BT):
            if isinstance(self.teacher, Vocabulary):
                with as_teacher(self.student):
                    states = prefix_states(self.student, ids_BS, n_layers, self.teacher)
            else:
                states = prefix_states(self.teacher, ids_BS, n_layers)
        return {PREFIX: self.prefix.latents.measure(states, batch)}

    def _states_for(self, request: StudentHalf) -> HiddenStates:
        """Run the student as far as the request's losses read it."""
        batch = request.batch
        if request.is_prefix:
            assert self.prefix is not None
            with self._autocast(batch.student.ids_BT):
                return prefix_states(self.student, batch.student.ids_BT, self.prefix.n_layers)
        if not request.from_last_layer:
            return self._student_states(batch, self.collect)
        with graph_from(self.last_layer):
            states = self._student_states(batch, self.collect)
        return with_frozen_head(states)

    def _student_states(
        self, batch: Batch, collect: frozenset[StateKind] = frozenset(), own: OwnVocabulary | None = None
    ) -> HiddenStates:
        return self._states(self.student, batch, batch.student, own, collect)

    def _teacher_states(self, batch: Batch, collect: frozenset[StateKind] = frozenset()) -> HiddenStates:
        assert self.teacher is not None
        if isinstance(self.teacher, Vocabulary):
            with as_teacher(self.student):
                return self._states(self.student, batch, batch.teacher, self.teacher, collect)
        return self._states(self.teacher, batch, batch.teacher, None, collect)

    def _states(
        self, model: CausalLM, batch: Batch, side: Side, rows: Rows | None, collect: frozenset[StateKind]
    ) -> HiddenStates:
        with self._autocast(batch.student.ids_BT):
            if side.packed is None:
                states = model(side.ids_BT, rows, collect, side.position_BT)
            else:
                states = model(side.packed.ids_RP, rows, collect, side.packed.position_RP)
                states = states.map(side.packed.unpack)
        return _without_spoiled(self._in_compute_dtype(states), side)

    def _autocast(self, ids_BT: Tensor) -> AbstractContextManager[Any]:
        if self.compute_dtype in (None, torch.float32):
            return nullcontext()
        return torch.autocast(ids_BT.device.type, dtype=self.compute_dtype)

    def _in_compute_dtype(self, states: HiddenStates) -> HiddenStates:
        """Cast hidden states and head to one type: the kernels multiply like with like."""
        dtype = self.compute_dtype or states.hidden_BTD.dtype
        embedded_BTD = states.embedded_BTD
        return replace(
            states,
            hidden_BTD=states.hidden_BTD.to(dtype),
            head=self._head(states.head, states),
            embedded_BTD=None if embedded_BTD is None else embedded_BTD.to(dtype),
        )

    def _head(self, head: Head, states: HiddenStates | None) -> Head:
        """Cast a head to the type of the hidden states that it will multiply."""
        dtype = self.compute_dtype or (head.weight_VD.dtype if states is None else states.hidden_BTD.dtype)
        return in_dtype(head, dtype)


def _without_spoiled(states: HiddenStates, side: Side) -> HiddenStates:
    """Put 0 in place of states that are not finite, which kernels refuse, and remember that there were some.

    Such a rank goes on to the end of the step: an error here would leave the others in a collective.
    """
    finite_BTD = states.hidden_BTD.isfinite()
    position_T = torch.arange(finite_BTD.shape[1], device=finite_BTD.device)
    is_padding_BT = position_T >= side.length_B[:, None]
    is_well = (finite_BTD.all(-1) | is_padding_BT).all()
    spoiled = torch.where(is_well, 0.0, torch.nan)
    return replace(states, hidden_BTD=states.hidden_BTD.masked_fill(~finite_BTD, 0), spoiled=spoiled)


def _nan_term(hidden_BTD: Tensor, count: Any) -> LossTerm:
    """Return a total that is NaN and reaches the student, so that its backward runs as on the other ranks."""
    nan = hidden_BTD.float().sum() * 0 + torch.nan
    return LossTerm(nan.expand_as(torch.as_tensor(count)), count)


def _nats(states: HiddenStates, side: Side, share_BT: Tensor | None) -> Tensor:
    """Return the nats of the trained tokens; NaN where there is no such number."""
    try:
        nats_BT = token_nats(states, side)
    except NotFiniteError:
        return states.hidden_BTD.new_full((), torch.nan, dtype=torch.float32)
    nats = (nats_BT if share_BT is None else nats_BT * share_BT).sum()
    return nats if states.spoiled is None else nats + states.spoiled


def _spoil(term: LossTerm, *spoiled: Tensor | None) -> LossTerm:
    total = term.total
    for nan in spoiled:
        total = total if nan is None else total + nan
    return LossTerm(total, term.count)
