"""X-Token's P-KL: carry the student's probabilities into the teacher's vocabulary, and compare there.

Our implementation. A sparse projection says to which of the teacher's tokens each student token goes, and
with which weights: whole to the token of the same bytes, else to the pieces that the teacher's tokenizer
writes it with (`tokenkit.pairing.matching.projection_entries`).

    r = P p, over the teacher's ids that some student id goes to;  q the teacher's, over the same ids
    loss = mean over chunks of KL(q ‖ r), at the rows that predict a chunk's first tokens

There both models have read the same text. The paper's description leaves open how distributions of a chunk
with several tokens are joined and what becomes of ids without a partner: here the first row speaks for the
chunk, and both sides are renormalised over the ids that are reached. Not multiplied by T².

Source: Turuvekere Sreenivas et al. 2026, "X-Token: Projection-Guided Cross-Tokenizer Knowledge
Distillation", arXiv:2605.21699.

Dimensions: N chunks, V student vocabulary, W teacher vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels.projected_divergence import Projection, projected_divergence
from tokenkit.losses.base import Loss, Pair, without_gradient
from tokenkit.losses.options import WORKSPACE_BYTES, XTokenOptions
from tokenkit.losses.score import RowPairs, chunk_starts, in_dtype, need_head, need_teacher, take
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class XTokenPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: chunks."""
    rows: RowPairs
    teacher_NE: Tensor


class XToken(Loss[XTokenOptions]):
    """Distributions over the teacher's vocabulary, the student's carried there.

    Args:
        options: how they are compared.
        projection: made by `tokenkit.kernels.projected_divergence.make_projection`.
    """

    reads_teacher_head = True

    def __init__(self, options: XTokenOptions, projection: Projection):
        super().__init__(options)
        self.projection = projection

    @classmethod
    def resources(cls, options: XTokenOptions, pair: Pair) -> dict[str, Any]:
        """Return where the student's tokens go."""
        return {"projection": pair.projection()}

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> XTokenPrepared:
        """Find the starts of chunks, and keep the teacher's states there."""
        teacher = need_teacher(teacher, "baseline_xtoken")
        rows = chunk_starts(batch, self.options.chunks)
        count = torch.full((), len(rows.student_N), device=rows.student_N.device)
        return XTokenPrepared(count, rows, take(teacher.hidden_BTD, batch.teacher, rows.teacher_N))

    def loss(
        self, student: HiddenStates, prepared: XTokenPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed divergence, nats, and the number of chunks."""
        options = self.options
        student_ND = take(student.hidden_BTD, batch.student, prepared.rows.student_N)
        total = projected_divergence(
            student_ND,
            in_dtype(student.head, student_ND.dtype),
            prepared.teacher_NE,
            need_head(context.teacher_head, prepared.teacher_NE.dtype),
            self.projection.to(student_ND.device),
            torch.ones(len(student_ND), device=student_ND.device),
            temperature=options.temperature,
            teacher_temperature=options.teacher_temperature,
            workspace_bytes=options.workspace_bytes,
        )
        return LossTerm(total, prepared.count)


def xtoken_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    projection: Projection,
    *,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    chunks: ChunkKind = "unconstrained",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare in the teacher's vocabulary: the drop-in form.

    Args:
        student: hidden states and head of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks.
        projection: from the student's vocabulary into the teacher's; `tokenkit.make_loss` finds it of two
            tokenizers.
        temperature: divides the logits of both models.
        teacher_temperature: multiplies it for the teacher.
        chunks: which of the batch's chunks.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total, nats, differentiable in the student's hidden states and head; count, chunks, at least 1.
    """
    options = XTokenOptions(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        chunks=chunks,
        workspace_bytes=workspace_bytes,
    )
    return XToken(options, projection)(student, teacher, batch)
