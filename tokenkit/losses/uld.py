"""Universal Logit Distillation: compare sorted probabilities, position by position, whatever the tokens are.

    loss = Σ_{b, i} Σ_r |p_(r) − q_(r)| / number of (b, i)      p, q in descending order, at temperature T

over positions i of row b whose next student token is scored and which the teacher's row has too. The i-th
position of the student faces the i-th of the teacher: nothing is aligned.

Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
LLMs", arXiv:2402.12030.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels.linear_logprob import DEFAULT_WORKSPACE_BYTES
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.losses.registry import Loss, whole
from tokenkit.losses.rows import RowPairs, check_temperatures, need_head, need_teacher, take
from tokenkit.losses.score import in_dtype, scored_tokens
from tokenkit.structs import NO_CONTEXT, Batch, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class UldOptions:
    """How sorted probabilities are compared. Checked when built; ValueError names the field."""

    temperature: float = 1.0
    """Divides the logits of both models."""
    exact: bool = False
    """Sort, instead of adding up histograms; see `tokenkit.kernels.sorted_distance`."""
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    """Memory for the heads beside results, bytes."""

    def __post_init__(self) -> None:
        check_temperatures(self)


@dataclass(frozen=True, slots=True)
class UldPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: positions that are compared."""
    rows: RowPairs
    teacher_NE: Tensor
    """The teacher's hidden states at its rows."""


@torch.no_grad()
def prepare(
    teacher: HiddenStates | None, batch: Batch, options: UldOptions, context: Context = NO_CONTEXT
) -> UldPrepared:
    """Find the positions that both rows have, and keep the teacher's states there."""
    teacher = need_teacher(teacher, "baseline_uld")
    T, S = batch.student.ids_BT.shape[1], batch.teacher.ids_BT.shape[1]
    position_T = torch.arange(T, device=batch.student.ids_BT.device)
    predicts_BT = torch.nn.functional.pad(scored_tokens(batch.student)[:, 1:], (0, 1))
    compared_BT = predicts_BT & (position_T < batch.teacher.length_B[:, None])
    row_N = compared_BT.flatten().nonzero()[:, 0]
    teacher_N = row_N // T * S + row_N % T
    rows = RowPairs(row_N, teacher_N)
    return UldPrepared(compared_BT.sum(), rows, take(teacher.hidden_BTD, batch.teacher, teacher_N))


def function(
    student: HiddenStates,
    prepared: UldPrepared,
    batch: Batch,
    options: UldOptions,
    context: Context = NO_CONTEXT,
) -> LossTerm:
    """Return the summed distance, of probabilities, and the number of positions."""
    student_ND = take(student.hidden_BTD, batch.student, prepared.rows.student_N)
    total = sorted_distance(
        student_ND,
        in_dtype(student.head, student_ND.dtype),
        prepared.teacher_NE,
        need_head(context.teacher_head, prepared.teacher_NE.dtype),
        temperature=options.temperature,
        exact=options.exact,
        workspace_bytes=options.workspace_bytes,
        row_weight_N=torch.ones(len(student_ND), device=student_ND.device),
    )
    return LossTerm(total, prepared.count)


LOSS = Loss(prepare, function, UldOptions, chunks=None)


def uld_loss(student: HiddenStates, teacher: HiddenStates, batch: Batch, **options: Any) -> LossTerm:
    """Compare sorted probabilities: the drop-in form. `options`: the fields of `UldOptions`.

    Returns:
        total, differentiable in the student's hidden states and head; count, positions, at least 1.
    """
    return whole(LOSS, student, teacher, batch, UldOptions(**options))
