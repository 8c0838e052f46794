"""A hybrid for vocabularies that overlap in part, after GOLD's: of our own, no published loss.

Where both models have read the same text, at the rows that predict the first tokens of a chunk:

    matched     JS(p̄, q̄) over pairs of tokens with the same bytes, all other tokens of a side one outcome
    unmatched   q_U Σ_r |a_(r) − b_(r)|: sorted probabilities of the tokens outside the pairs, given that it
                is one of them; q_U is the teacher's probability of that
    loss        mean over chunks of  w matched + (1 − w) unmatched,   w = pairs / teacher's vocabulary

It differs from the published loss (`gold.py`) in two points. That takes probabilities of the matched tokens
as they are, so that its divergence is not one between distributions, and sorts those of the others as they
are; here the chain rule parts each distribution into whether a token is matched, and which one. And that
multiplies a chunk's distribution by the probabilities of its other tokens, which here do not take part.

After: Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model Family"; ULD: arXiv:2402.12030.

Dimensions: N chunks, P pairs of tokens, V student vocabulary, W teacher vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels.linear_divergence import Outcomes
from tokenkit.kernels.linear_logprob import IGNORE, linear_logprob
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.losses.base import Loss, Pair, without_gradient
from tokenkit.losses.options import WORKSPACE_BYTES, GoldJsOptions
from tokenkit.losses.score import (
    RowPairs,
    check_pairs,
    chunk_starts,
    in_dtype,
    need_head,
    need_teacher,
    paired_outcomes,
    summed_divergence,
    take,
)
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, Head, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class GoldJsPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: chunks."""
    rows: RowPairs
    teacher_NE: Tensor
    outcomes: Outcomes
    unmatched_N: Tensor
    """q_U: the teacher's probability of a token without a partner."""


def _vocab_size(head: Head) -> int:
    return head.weight_VD.shape[0] if head.vocab_size is None else head.vocab_size


def _unmatched(head: Head, index_P: Tensor) -> Tensor:
    """Return [V] bool: the ids outside the pairs."""
    mask_V = torch.ones(_vocab_size(head), dtype=torch.bool, device=head.weight_VD.device)
    mask_V[index_P.to(mask_V.device)] = False
    return mask_V


def _rest(head: Head, index_P: Tensor) -> Head:
    """Return the head of the ids outside the pairs alone; their number is known without asking the device."""
    mask_V = _unmatched(head, index_P)
    index = mask_V.long().argsort(descending=True, stable=True)[: len(mask_V) - len(index_P)]
    bias_V = None if head.bias_V is None else head.bias_V.index_select(0, index)
    return Head(head.weight_VD.index_select(0, index), bias_V, head.softcap, head.scale)


class GoldJs(Loss[GoldJsOptions]):
    """Matched tokens one by one, the others by rank.

    Args:
        options: how distributions are compared.
        student_index: int64 [P], student ids of the pairs, none twice.
        teacher_index: int64 [P], their partners, none twice; `tokenkit.pairing.matching` finds them.
    """

    reads_teacher_head = True

    def __init__(self, options: GoldJsOptions, student_index: Tensor, teacher_index: Tensor):
        super().__init__(options)
        check_pairs(student_index, teacher_index)
        for name, index_P in (("student_index", student_index), ("teacher_index", teacher_index)):
            if len(index_P.unique()) < len(index_P):
                raise ValueError(f"{name} names an id twice: matched tokens face each other one to one")
        self.student_index, self.teacher_index = student_index, teacher_index
        self._outcomes: dict[Any, Outcomes] = {}

    @classmethod
    def resources(cls, options: GoldJsOptions, pair: Pair) -> dict[str, Any]:
        """Return the tokens of the same bytes."""
        return pair.matching()

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> GoldJsPrepared:
        """Find the starts of chunks, and how likely the teacher finds a token without a partner there."""
        options = self.options
        teacher = need_teacher(teacher, "baseline_gold_js")
        for name, divided in (("student", context.student_head), ("teacher", teacher.head)):
            if divided is not None and divided.shard is not None:
                raise ValueError(
                    f"the {name}'s head is divided over processes: baseline_gold_js picks rows of it by "
                    "id, and needs it whole"
                )
        rows = chunk_starts(batch, options.chunks)
        teacher_NE = take(teacher.hidden_BTD, batch.teacher, rows.teacher_N)
        head = in_dtype(teacher.head, teacher_NE.dtype)
        mask_W = _unmatched(head, self.teacher_index)
        unmatched_N = torch.zeros(len(teacher_NE), device=teacher_NE.device)
        if len(self.teacher_index) < len(mask_W):
            said = linear_logprob(
                teacher_NE,
                head,
                torch.full_like(rows.teacher_N, IGNORE),
                subset_V=mask_W,
                temperature=options.temperature,
                workspace_bytes=options.workspace_bytes,
            )
            assert said.subset_logp_N is not None
            unmatched_N = said.subset_logp_N.exp()
        count = torch.full((), len(rows.student_N), device=rows.student_N.device)
        outcomes = paired_outcomes(
            self.student_index, self.teacher_index, context, self._outcomes, whole=True
        )
        return GoldJsPrepared(count, rows, teacher_NE, outcomes, unmatched_N)

    def loss(
        self, student: HiddenStates, prepared: GoldJsPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed loss, and the number of chunks."""
        options = self.options
        student_ND = take(student.hidden_BTD, batch.student, prepared.rows.student_N)
        head = in_dtype(student.head, student_ND.dtype)
        teacher_head = need_head(context.teacher_head, prepared.teacher_NE.dtype)
        student_index, teacher_index = (
            index_P.to(student_ND.device) for index_P in (self.student_index, self.teacher_index)
        )
        matched = summed_divergence(
            student_ND,
            head,
            prepared.teacher_NE,
            teacher_head,
            "js",
            outcomes=prepared.outcomes,
            rest_as_outcome=True,
            temperature=options.temperature,
            teacher_temperature=options.teacher_temperature,
            workspace_bytes=options.workspace_bytes,
        )
        weight = options.matched_weight
        if weight is None:
            weight = len(teacher_index) / _vocab_size(teacher_head)
        total = weight * matched
        if len(teacher_index) < _vocab_size(teacher_head) and len(student_index) < _vocab_size(head):
            unmatched = sorted_distance(
                student_ND,
                _rest(head, student_index),
                prepared.teacher_NE,
                _rest(teacher_head, teacher_index),
                temperature=options.temperature,
                exact=options.exact,
                workspace_bytes=options.workspace_bytes,
                row_weight_N=prepared.unmatched_N,
            )
            total = total + (1 - weight) * unmatched
        return LossTerm(total, prepared.count)


def gold_js_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    student_index: Tensor,
    teacher_index: Tensor,
    *,
    matched_weight: float | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    exact: bool | None = None,
    chunks: ChunkKind = "unconstrained",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare matched tokens one by one and the others by rank: the drop-in form.

    Args:
        student: hidden states and head of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks.
        student_index: int64 [P], student ids of the matched tokens.
        teacher_index: int64 [P], their partners.
        matched_weight: of the matched part; None: pairs / teacher's vocabulary.
        temperature: divides the logits of both models.
        teacher_temperature: multiplies it for the teacher.
        exact: sort (True), add up histograms (False), or sort where that is cheap (None).
        chunks: which of the batch's chunks.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total, differentiable in the student's hidden states and head; count, chunks, at least 1.
    """
    options = GoldJsOptions(
        matched_weight=matched_weight,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        exact=exact,
        chunks=chunks,
        workspace_bytes=workspace_bytes,
    )
    return GoldJs(options, student_index, teacher_index)(student, teacher, batch)
