"""Universal Logit Distillation: compare sorted probabilities, position by position, whatever the tokens are.

    loss = Σ_{a, i} Σ_r |p_(r) − q_(r)| / number of (a, i)      p, q in descending order, at temperature T

over tokens i of answers a that both models have, p and q the distributions that predict them: an answer is
counted from its own start, so that prompts of other lengths do not matter, and nothing in it is aligned. In a
text without a prompt the first token is predicted by nothing and left out on both sides; there the teacher's
last row, which predicts no token, still faces the student's.

    extended   Σ_r |c p_(r) − d q_(r)| over groups of tokens that end at the same byte: p, q predict a group's
               last token, c, d are the probabilities of those before (`answers.py`)

Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
LLMs", arXiv:2402.12030; extended: Patiño et al. 2025 (TRL's GOLD).

Dimensions: N positions or groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenkit.kernels.hybrid_distance import Measure, hybrid_distance
from tokenkit.kernels.launch import upload
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.losses.answers import Groups, answer_tokens, by_position, extended_groups
from tokenkit.losses.base import Loss, without_gradient
from tokenkit.losses.gold import log_scales, need_whole
from tokenkit.losses.options import WORKSPACE_BYTES, UldOptions
from tokenkit.losses.score import RowPairs, in_dtype, need_head, need_teacher, take
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class UldPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: positions or groups that are compared."""
    rows: RowPairs
    teacher_NE: Tensor
    """The teacher's hidden states at its rows."""
    groups: Groups | None
    teacher_log_scale_N: Tensor | None
    """log d, with `extended`."""


def _predicting(student_BT: Tensor, teacher_BS: Tensor) -> RowPairs:
    """Return the rows that predict token i of an answer, on both sides."""
    T, S = student_BT.shape[1], teacher_BS.shape[1]
    begins_BS = teacher_BS.int().cumprod(1).bool()
    is_whole_B1 = (begins_BS == teacher_BS).all(1, keepdim=True)  # no prompt, and one answer
    behind_BS = torch.nn.functional.pad(begins_BS & is_whole_B1, (1, 0))
    teacher_BS = torch.nn.functional.pad(teacher_BS, (0, 1)) | behind_BS
    student_N, teacher_N = by_position(student_BT, teacher_BS)
    is_predicted_N = (student_N % T > 0) & (teacher_N % (S + 1) > 0)
    student_N, teacher_N = student_N[is_predicted_N] - 1, teacher_N[is_predicted_N] - 1
    return RowPairs(student_N, teacher_N - teacher_N // (S + 1))


class Uld(Loss[UldOptions]):
    """Sorted probabilities of positions or groups that face each other."""

    reads_teacher_head = True

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> UldPrepared:
        """Find the positions that both answers have, and keep the teacher's states there."""
        options = self.options
        teacher = need_teacher(teacher, "baseline_uld")
        device = batch.student.ids_BT.device
        answers = answer_tokens(batch.on_host, options.chunks)
        groups = log_scale_N = None
        if options.extended:
            need_whole("baseline_uld with extended", context.student_head, teacher.head)
            groups = upload(extended_groups(batch.on_host, options.chunks, *answers, "bayesian"), device)
            rows = groups.rows
            log_scale_N = log_scales(
                teacher,
                batch.teacher,
                groups.teacher,
                len(rows.teacher_N),
                options.temperature,
                options.workspace_bytes,
            )
        else:
            rows = upload(_predicting(*answers), device)
        count = torch.full((), len(rows.student_N), device=rows.student_N.device)
        teacher_NE = take(teacher.hidden_BTD, batch.teacher, rows.teacher_N)
        return UldPrepared(count, rows, teacher_NE, groups, log_scale_N)

    def loss(
        self, student: HiddenStates, prepared: UldPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed distance, of probabilities, and the number of positions or groups."""
        options = self.options
        student_ND = take(student.hidden_BTD, batch.student, prepared.rows.student_N)
        head = in_dtype(student.head, student_ND.dtype)
        teacher_head = need_head(context.teacher_head, prepared.teacher_NE.dtype)
        one_N = torch.ones(len(student_ND), device=student_ND.device)
        if prepared.groups is None or prepared.teacher_log_scale_N is None:
            total = sorted_distance(
                student_ND,
                head,
                prepared.teacher_NE,
                teacher_head,
                temperature=options.temperature,
                exact=options.exact,
                workspace_bytes=options.workspace_bytes,
                row_weight_N=one_N,
            )
            return LossTerm(total, prepared.count)
        temperature, workspace_bytes = options.temperature, options.workspace_bytes
        log_scale_N = log_scales(
            student, batch.student, prepared.groups.student, len(student_ND), temperature, workspace_bytes
        )
        total = hybrid_distance(
            (student_ND, head, log_scale_N),
            (prepared.teacher_NE, teacher_head, prepared.teacher_log_scale_N),
            one_N,
            measure=Measure(
                exact=options.exact,
                temperature=temperature,
                teacher_temperature=temperature,
                workspace_bytes=workspace_bytes,
            ),
        )
        return LossTerm(total, prepared.count)


def uld_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    *,
    temperature: float = 1.0,
    exact: bool | None = None,
    extended: bool = False,
    chunks: ChunkKind = "unconstrained",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare sorted probabilities: the drop-in form.

    Args:
        student: hidden states and head of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks.
        temperature: divides the logits of both models.
        exact: sort (True), add up histograms (False), or sort where that is cheap (None).
        extended: compare groups of tokens that end at the same byte, not token i with token i.
        chunks: which of the batch's chunks are those groups.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total, differentiable in the student's hidden states and head; count, positions, at least 1.
    """
    options = UldOptions(
        temperature=temperature,
        exact=exact,
        extended=extended,
        chunks=chunks,
        workspace_bytes=workspace_bytes,
    )
    return Uld(options)(student, teacher, batch)
