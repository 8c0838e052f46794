"""Which rows of hidden states face each other in the two models, and what faces what.

    row of [B·T, D]     position i of a row's tokens: it has read tokens 0..i and predicts token i + 1
    chunk ends          the last tokens of an aligned chunk: both models have read the same text
    chunk starts        the rows that predict a chunk's first tokens: the same, one chunk earlier

Only rows that a loss names reach a head.

Dimensions: B documents, T student positions, S teacher positions, C chunk slots (T + S), N rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.chunk_likelihood import Layout, Spans, lay_out
from tokenkit.kernels.linear_divergence import Outcomes, linear_divergence, match_outcomes
from tokenkit.losses.score import check_states, in_dtype, scored_tokens
from tokenkit.structs import Batch, ChunkKind, Chunks, Context, Head, HiddenStates, Side


class RowPairs(NamedTuple):
    """Rows of both models that face each other."""

    student_N: Tensor
    """int64 rows of [B·T, D], rising."""
    teacher_N: Tensor
    """int64 rows of [B·S, E], of the same number."""


def chunks_of(batch: Batch, kind: ChunkKind) -> Chunks:
    """Return the batch's chunks of that kind; ValueError names those it has."""
    if kind not in batch.chunks:
        raise ValueError(
            f"the batch has no {kind!r} chunks, only {sorted(batch.chunks)}: "
            "name them in the collator's chunk_kinds"
        )
    return batch.chunks[kind]


def valid_chunks(batch: Batch, kind: ChunkKind) -> Layout:
    """Find the chunks with tokens on both sides, all of them scored and kept by the loss mask."""
    chunks = chunks_of(batch, kind)
    scored_BT, scored_BS = scored_tokens(batch.student), scored_tokens(batch.teacher)
    return lay_out(chunks.student_BT, chunks.teacher_BS, scored_BT, scored_BS)


def aligned_chunks(batch: Batch, kind: ChunkKind) -> Layout:
    """Find the chunks with tokens on both sides, whatever the loss mask says."""
    chunks = chunks_of(batch, kind)
    return lay_out(
        chunks.student_BT,
        chunks.teacher_BS,
        torch.ones_like(chunks.student_BT, dtype=torch.bool),
        torch.ones_like(chunks.teacher_BS, dtype=torch.bool),
    )


def chunk_ends(batch: Batch, kind: ChunkKind) -> RowPairs:
    """Return the last tokens of aligned chunks whose last tokens the loss mask keeps, one row per chunk.

    A leading BOS is a chunk like any other. Waits for the device once: the number of rows is the size of
    every GEMM that follows.
    """
    layout = aligned_chunks(batch, kind)
    kept_BC = layout.valid_BC
    for spans, side in ((layout.student, batch.student), (layout.teacher, batch.teacher)):
        kept_BC = kept_BC & side.trained_BT.gather(1, spans.last_BC.where(layout.valid_BC, 0))
    return _pairs(layout, kept_BC, layout.student.last_BC, layout.teacher.last_BC)


def chunk_starts(batch: Batch, kind: ChunkKind, *, one_to_one: bool = False) -> RowPairs:
    """Return the rows that predict the first tokens of valid chunks.

    Args:
        batch: the batch.
        kind: which of its chunks.
        one_to_one: leave out chunks with more than one token on either side.
    """
    layout = valid_chunks(batch, kind)
    kept_BC = layout.valid_BC
    if one_to_one:
        kept_BC = kept_BC & (layout.teacher_tokens_BC == 1) & (_tokens(layout.student) == 1)
    first_BC, first_teacher_BC = _first(layout.student), _first(layout.teacher)
    return _pairs(layout, kept_BC, first_BC - 1, first_teacher_BC - 1)


def _pairs(layout: Layout, kept_BC: Tensor, student_BC: Tensor, teacher_BC: Tensor) -> RowPairs:
    T, S = layout.student.slot_BL.shape[1], layout.teacher.slot_BL.shape[1]
    row_B1 = torch.arange(len(kept_BC), device=kept_BC.device)[:, None]
    slot_N = kept_BC.flatten().nonzero()[:, 0]
    return RowPairs((row_B1 * T + student_BC).flatten()[slot_N], (row_B1 * S + teacher_BC).flatten()[slot_N])


def _first(spans: Spans) -> Tensor:
    """Return [B, C] the position of each slot's first own token: a span may begin with tokens of no chunk."""
    B, L = spans.slot_BL.shape
    position_BL = torch.arange(L, device=spans.slot_BL.device).expand(B, L)
    first_BC = torch.full((B, spans.start_BC.shape[1] + 1), L, device=position_BL.device)
    return first_BC.scatter_reduce_(1, spans.slot_BL, position_BL, "amin")[:, :-1]


def _tokens(spans: Spans) -> Tensor:
    """Return [B, C] the number of each slot's own tokens."""
    count_BC = torch.zeros_like(torch.nn.functional.pad(spans.start_BC, (0, 1)))
    return count_BC.scatter_add_(1, spans.slot_BL, torch.ones_like(spans.slot_BL))[:, :-1]


def take(state_BTD: Tensor, side: Side, row_N: Tensor) -> Tensor:
    """Return [N, D] the named rows of a model's states; ValueError where the states are not of this batch."""
    if state_BTD.shape[:2] != side.ids_BT.shape:
        raise ValueError(
            f"hidden_BTD must hold one state per token {tuple(side.ids_BT.shape)}: "
            f"got {tuple(state_BTD.shape)}; are student and teacher swapped?"
        )
    return state_BTD.flatten(0, 1).index_select(0, row_N)


def frozen(head: Head) -> Head:
    """Return the head without a way for gradients into its parameters."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    return replace(head, weight_VD=head.weight_VD.detach(), bias_V=bias_V)


def need_teacher(teacher: HiddenStates | None, name: str) -> HiddenStates:
    """Return the teacher's states, or say that this loss cannot do without."""
    if teacher is None:
        raise ValueError(f"{name} compares with a teacher: got none")
    check_states(teacher, "teacher")
    return teacher


def need_head(head: Head | None, dtype: torch.dtype) -> Head:
    """Return the teacher's head, frozen and of the type of its hidden states."""
    if head is None:
        raise ValueError("this loss multiplies with the teacher's head: give it as Context.teacher_head")
    return in_dtype(frozen(head), dtype)


def check_pairs(student_index: Tensor, teacher_index: Tensor) -> None:
    """Raise ValueError unless both are int64 [P] of one length, P at least 1."""
    for name, index_P in (("student_index", student_index), ("teacher_index", teacher_index)):
        if index_P.ndim != 1 or index_P.dtype != torch.int64 or not len(index_P):
            raise ValueError(
                f"{name} must hold the int64 ids of at least one pair: got shape "
                f"{tuple(index_P.shape)}, {index_P.dtype}"
            )
    if len(student_index) != len(teacher_index):
        raise ValueError(
            "student_index and teacher_index must hold one id for each pair: got "
            f"{len(student_index)} and {len(teacher_index)}"
        )


def paired_outcomes(
    student_index: Tensor, teacher_index: Tensor, context: Context, *, whole: bool
) -> Outcomes:
    """Find the columns of a divergence over pairs, in the first half: it waits for the device once.

    Args:
        student_index: int64 [P] student ids.
        teacher_index: int64 [P] their partners.
        context: with both heads, whose vocabularies must hold the ids.
        whole: probabilities are those under the full vocabularies.
    """
    head, teacher_head = context.student_head, context.teacher_head
    if head is None or teacher_head is None:
        raise ValueError("this loss must know both vocabularies: give both heads in its Context")
    device = head.weight_VD.device
    indices = {"student_index": student_index.to(device), "teacher_index": teacher_index.to(device)}
    return match_outcomes(head, teacher_head, **indices, whole=whole)


def summed_divergence(
    student_ND: Tensor, student_head: Head, teacher_NE: Tensor, teacher_head: Head, kind: str, **options: Any
) -> Tensor:
    """Return `linear_divergence` summed over rows: their weights are known, so gradients form at once."""
    one_N = torch.ones(len(student_ND), dtype=torch.float32, device=student_ND.device)
    return linear_divergence(
        student_ND,
        in_dtype(student_head, student_ND.dtype),
        teacher_NE,
        teacher_head,
        kind,
        row_weight_N=one_N,
        **options,
    )
