"""Knowledge fusion over a mined vocabulary mapping: each student token stands for its nearest teacher token.

    one token on each side     D(q, p), p over the student's ids, q over the teacher's logits gathered by the
                               mapping (student id -> teacher id), at the row that predicts the token
    any other aligned token    D(1_y, p), 1_y all on that token y

D: `divergence`, by default KL(q ‖ p), of which the second row is cross entropy. With p_y = p(y),

    kl     −log p_y
    skl    −log(λ + (1 − λ) p_y)
    srkl   p_y log(p_y / (1 − λ + λ p_y)) − (1 − p_y) log λ
    js     (p_y log(p_y / m) − log m + (1 − p_y) log 2) / 2,   m = (1 + p_y) / 2

and cross entropy for rkl and akl, which are infinite there. Both at temperature T; the mean is over both
kinds of student tokens.

Source: Wan et al. 2024, "Knowledge Fusion of Large Language Models", arXiv:2401.10491 (MinED); divergences:
`kernels/linear_divergence/terms.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels.kinds import Divergence
from tokenkit.kernels.launch import upload
from tokenkit.losses.base import Loss, Pair, without_gradient
from tokenkit.losses.logprobs import LogprobRequest, ask
from tokenkit.losses.options import WORKSPACE_BYTES, MinedOptions
from tokenkit.losses.score import (
    RowPairs,
    aligned_chunks,
    chunk_starts,
    in_dtype,
    need_head,
    need_teacher,
    scored_tokens,
    summed_divergence,
    take,
)
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class MinedPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: student tokens of both kinds."""
    pairs: RowPairs
    teacher_NE: Tensor
    others: LogprobRequest
    other_N: Tensor
    """int64 places of its tokens in [B·T]."""


def _from_one_hot(logp_N: Tensor, kind: str, skew: float) -> Tensor:
    """Return D(1_y, p), of which log p(y) is all that must be known."""
    p_N = logp_N.exp()
    if kind == "js":
        log_m_N = torch.log1p(p_N) - math.log(2)
        return (p_N * (logp_N - log_m_N) - log_m_N + (1 - p_N) * math.log(2)) / 2
    if kind in ("skl", "srkl") and 0 < skew < 1:
        share = skew if kind == "skl" else 1 - skew  # of the one-hot distribution in the mixture
        log_m_N = torch.logaddexp(logp_N + math.log1p(-share), torch.full_like(logp_N, math.log(share)))
        if kind == "skl":
            return -log_m_N
        return p_N * (logp_N - log_m_N) - (1 - p_N) * math.log(skew)
    if kind in ("skl", "srkl") and skew == 1:
        return 0 * logp_N
    return -logp_N


class Mined(Loss[MinedOptions]):
    """Distributions over the student's vocabulary, the teacher's through a mapping.

    Args:
        options: how they are compared.
        teacher_index: int64 [V], the teacher's id for each id of the student's vocabulary.
    """

    reads_teacher_head = True

    def __init__(self, options: MinedOptions, teacher_index: Tensor):
        super().__init__(options)
        if teacher_index.ndim != 1 or teacher_index.dtype != torch.int64:
            raise ValueError(
                "teacher_index must hold one int64 teacher id for each student id: got shape "
                f"{tuple(teacher_index.shape)}, {teacher_index.dtype}"
            )
        self.teacher_index = teacher_index

    @classmethod
    def resources(cls, options: MinedOptions, pair: Pair) -> dict[str, Any]:
        """Return the mined mapping."""
        return {"teacher_index": pair.mapping()}

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> MinedPrepared:
        """Find the tokens of both kinds, and keep the teacher's states where they are needed."""
        options = self.options
        teacher = need_teacher(teacher, "baseline_mined")
        on_host, device = batch.on_host, batch.student.ids_BT.device
        pairs = chunk_starts(on_host, options.chunks, one_to_one=True)
        aligned = aligned_chunks(on_host, options.chunks)
        is_aligned_BT = torch.nn.functional.pad(aligned.valid_BC, (0, 1)).gather(1, aligned.student.slot_BL)
        other_BT = scored_tokens(on_host.student) & is_aligned_BT
        other_BT.view(-1)[pairs.student_N + 1] = False
        other_N = other_BT.flatten().nonzero()[:, 0]
        pairs, other_N = upload(pairs, device), upload(other_N, device)
        return MinedPrepared(
            torch.full((), len(pairs.student_N) + len(other_N), device=device),
            pairs,
            take(teacher.hidden_BTD, batch.teacher, pairs.teacher_N),
            LogprobRequest(
                on_host.student,
                other_BT,
                temperature=options.temperature,
                workspace_bytes=options.workspace_bytes,
            ),
            other_N,
        )

    def student_request(self, prepared: MinedPrepared) -> LogprobRequest:
        """Return the request for the tokens that no token of the teacher's faces."""
        return prepared.others

    def loss(
        self, student: HiddenStates, prepared: MinedPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the sum of divergences and cross entropies, nats, and the number of tokens."""
        options = self.options
        student_ND = take(student.hidden_BTD, batch.student, prepared.pairs.student_N)
        head = in_dtype(student.head, student_ND.dtype)
        divergence = summed_divergence(
            student_ND,
            head,
            prepared.teacher_NE,
            need_head(context.teacher_head, prepared.teacher_NE.dtype),
            options.divergence,
            teacher_index=self.teacher_index.to(student_ND.device),
            skew=options.skew,
            alpha=options.alpha,
            temperature=options.temperature,
            teacher_temperature=options.teacher_temperature,
            workspace_bytes=options.workspace_bytes,
        )
        scores = context.scores or ask(student, prepared.others)
        logp_N = scores.logp_BT.flatten().index_select(0, prepared.other_N)
        others_N = _from_one_hot(logp_N, options.divergence, options.skew)
        return LossTerm(divergence + others_N.sum(), prepared.count)


def mined_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    teacher_index: Tensor,
    *,
    divergence: Divergence = "kl",
    skew: float = 0.1,
    alpha: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    chunks: ChunkKind = "unconstrained",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare with the teacher through a mined mapping: the drop-in form.

    Args:
        student: hidden states and head of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks.
        teacher_index: int64 [V], the teacher's id for each student id; `tokenkit mined-mapping` makes one.
        divergence: kl, rkl, skl, srkl, js or akl.
        skew: mixing share of skl and srkl, in [0, 1].
        alpha: mass left to the tail in akl, in [0, 1].
        temperature: divides the logits of both models.
        teacher_temperature: multiplies it for the teacher.
        chunks: which of the batch's chunks.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total, nats, differentiable in the student's hidden states and head; count, tokens, at least 1.
    """
    options = MinedOptions(
        divergence=divergence,
        skew=skew,
        alpha=alpha,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        chunks=chunks,
        workspace_bytes=workspace_bytes,
    )
    return Mined(options, teacher_index)(student, teacher, batch)
