"""Per-token divergence of two models that share their tokenizer: distillation without a change of one.

    loss = mean over tokens y_{i+1} of D(p_i, q_i),   p the student's next-token distribution, q the teacher's

at every row i where both sides have read the same tokens 0..i and the token that follows is the same and kept
by both loss masks. Where one side was cut shorter, what the other has beyond is left out. D is `divergence`,
by default KL(q ‖ p), at temperature T; not multiplied by T².

Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; divergences:
`kernels/linear_divergence/terms.py`.

Dimensions: N tokens, B documents, T student positions, S teacher positions, L the smaller of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.kinds import Divergence
from tokenkit.losses.base import Loss, without_gradient
from tokenkit.losses.options import WORKSPACE_BYTES, KlOptions
from tokenkit.losses.score import (
    RowPairs,
    need_head,
    need_teacher,
    on_its_device,
    scored_tokens,
    summed_divergence,
    take,
)
from tokenkit.structs import NO_CONTEXT, Batch, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class KlPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: tokens."""
    rows: RowPairs
    teacher_NE: Tensor


class Kl(Loss[KlOptions]):
    """Next-token distributions of two models on one tokenization."""

    reads_teacher_head = True

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> KlPrepared:
        """Find the tokens that both sides have, and keep the teacher's states in front of them.

        Raises:
            ValueError: no teacher, or ids that mean two things: of sides that say so, or by their number.
        """
        teacher = need_teacher(teacher, "kl")
        if None not in (meanings := {batch.student.ids_mean, batch.teacher.ids_mean}) and len(meanings) > 1:
            raise ValueError(
                "kl compares id with id, and ids of student and teacher stand for different bytes: their "
                "tokenizers differ (take an ALM loss or a baseline)"
            )
        if context.student_head is not None:
            sizes = vocab_size(context.student_head), vocab_size(teacher.head)
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"kl compares id with id, and the vocabularies have {sizes[0]} and {sizes[1]} tokens: "
                    "their tokenizers differ (take an ALM loss or a baseline), or padding rows are counted "
                    "(say Head(..., vocab_size=...))"
                )
        rows = shared_rows(batch)
        count = torch.full((), len(rows.student_N), device=rows.student_N.device)
        return KlPrepared(count, rows, take(teacher.hidden_BTD, batch.teacher, rows.teacher_N))

    def loss(
        self, student: HiddenStates, prepared: KlPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed divergence, nats, and the number of tokens."""
        options = self.options
        total = summed_divergence(
            take(student.hidden_BTD, batch.student, prepared.rows.student_N),
            student.head,
            prepared.teacher_NE,
            need_head(context.teacher_head, prepared.teacher_NE.dtype),
            options.divergence,
            skew=options.skew,
            alpha=options.alpha,
            temperature=options.temperature,
            teacher_temperature=options.teacher_temperature,
            workspace_bytes=options.workspace_bytes,
        )
        return LossTerm(total, prepared.count)


def shared_rows(batch: Batch) -> RowPairs:
    """Return the rows that have read the same and predict the same kept token."""
    student, teacher = batch.on_host.student, batch.on_host.teacher
    T, S = student.ids_BT.shape[1], teacher.ids_BT.shape[1]
    L = min(T, S)
    has_read_BL = (student.ids_BT[:, :L] == teacher.ids_BT[:, :L]).int().cumprod(1).bool()
    kept_BL = has_read_BL & scored_tokens(student)[:, :L] & scored_tokens(teacher)[:, :L]
    document_N, position_N = kept_BL.nonzero(as_tuple=True)
    rows = RowPairs(document_N * T + position_N - 1, document_N * S + position_N - 1)
    return on_its_device(batch, rows)


def kl_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    *,
    divergence: Divergence = "kl",
    skew: float = 0.1,
    alpha: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare next-token distributions of two models with one tokenizer: the drop-in form.

    Args:
        student: hidden states and head of the student.
        teacher: the same of the teacher, on the same tokens.
        batch: both sides, of one tokenizer; its chunks are not read.
        divergence: kl, rkl, skl, srkl, js or akl.
        skew: mixing share of skl and srkl, in [0, 1].
        alpha: mass left to the tail in akl, in [0, 1].
        temperature: divides the logits of both models.
        teacher_temperature: multiplies it for the teacher.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total, nats, differentiable in the student's hidden states and head; count, tokens, at least 1.
    """
    options = KlOptions(
        divergence=divergence,
        skew=skew,
        alpha=alpha,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        workspace_bytes=workspace_bytes,
    )
    return Kl(options)(student, teacher, batch)
