"""The side path of ALM: where both models have read the same text, compare what they expect to come next.

At the last token of each aligned chunk, a distance between the two next-token distributions over pairs of
tokens that mean the same:

    kl, reverse_kl                  under the whole vocabularies; all unpaired tokens of a side are one
                                    outcome
    kl_subset, reverse_kl_subset    both renormalised over the pairs
    log_abs                         mean over the pairs of |log p − log q|, under the whole vocabularies
    abs                             sum over the pairs of |p − q|, under the whole vocabularies

Mean over those chunks. q is the teacher's distribution, and no gradient reaches it.

Source: Minixhofer et al. 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood
Matching", arXiv:2503.20083.

Dimensions: N chunks, P pairs of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels.linear_divergence import Outcomes
from tokenkit.losses.base import Loss, Pair, without_gradient
from tokenkit.losses.options import WORKSPACE_BYTES, Distance, SidePathOptions
from tokenkit.losses.score import (
    RowPairs,
    check_pairs,
    chunk_ends,
    need_head,
    need_teacher,
    paired_outcomes,
    summed_divergence,
    take,
)
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, HiddenStates, LossTerm

DISTANCES: dict[
    Distance, tuple[str, bool]
] = {  # name: (kind of `linear_divergence`, unpaired tokens are one outcome)
    "kl": ("kl", True),
    "reverse_kl": ("rkl", True),
    "kl_subset": ("kl", False),
    "reverse_kl_subset": ("rkl", False),
    "log_abs": ("log_abs", False),
    "abs": ("abs", False),
}


@dataclass(frozen=True, slots=True)
class SidePathPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: chunks."""
    rows: RowPairs
    teacher_NE: Tensor
    outcomes: Outcomes


class SidePath(Loss[SidePathOptions]):
    """Next-token distributions at the ends of chunks, over pairs of tokens.

    Args:
        options: how they are compared.
        student_index: int64 [P], student ids of the pairs.
        teacher_index: int64 [P], their partners; `tokenkit.pairing.matching` finds pairs.
    """

    reads_teacher_head = True

    def __init__(self, options: SidePathOptions, student_index: Tensor, teacher_index: Tensor):
        super().__init__(options)
        check_pairs(student_index, teacher_index)
        self.student_index, self.teacher_index = student_index, teacher_index
        self._outcomes: dict[Any, Outcomes] = {}

    @classmethod
    def resources(cls, options: SidePathOptions, pair: Pair) -> dict[str, Any]:
        """Return the pairs of tokens that `mapping` names."""
        match options.mapping:
            case "exact_match":
                return pair.matching()
            case "bias_threshold":
                return pair.unbiased(options.bias_threshold)
            case "mined":
                return pair.nearest()

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> SidePathPrepared:
        """Find the ends of aligned chunks, and keep the teacher's states there."""
        options = self.options
        teacher = need_teacher(teacher, "alm_side_path")
        rows = chunk_ends(batch, options.chunks)
        count = torch.full((), len(rows.student_N), device=rows.student_N.device)
        is_whole = not options.distance_fn.endswith("_subset")
        outcomes = paired_outcomes(
            self.student_index, self.teacher_index, context, self._outcomes, whole=is_whole
        )
        return SidePathPrepared(
            count, rows, take(teacher.hidden_BTD, batch.teacher, rows.teacher_N), outcomes
        )

    def loss(
        self, student: HiddenStates, prepared: SidePathPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed distance, and the number of chunks."""
        options = self.options
        student_ND = take(student.hidden_BTD, batch.student, prepared.rows.student_N)
        kind, rest_as_outcome = DISTANCES[options.distance_fn]
        total = summed_divergence(
            student_ND,
            student.head,
            prepared.teacher_NE,
            need_head(context.teacher_head, prepared.teacher_NE.dtype),
            kind,
            outcomes=prepared.outcomes,
            rest_as_outcome=rest_as_outcome,
            workspace_bytes=options.workspace_bytes,
        )
        if kind == "log_abs":
            total = total / len(self.student_index)
        return LossTerm(total, prepared.count)


def side_path_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    student_index: Tensor,
    teacher_index: Tensor,
    *,
    distance_fn: Distance = "kl_subset",
    chunks: ChunkKind = "unconstrained",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare next-token distributions at the ends of chunks: the drop-in form.

    Args:
        student: hidden states and head of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks.
        student_index: int64 [P], student ids of the pairs of tokens that mean the same.
        teacher_index: int64 [P], their partners.
        distance_fn: how; see above.
        chunks: which of the batch's chunks.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total, differentiable in the student's hidden states and head; count, chunks, at least 1.
    """
    options = SidePathOptions(
        distance_fn=distance_fn,
        chunks=chunks,
        workspace_bytes=workspace_bytes,
    )
    return SidePath(options, student_index, teacher_index)(student, teacher, batch)
