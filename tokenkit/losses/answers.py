"""Answers inside documents, and which of their tokens face each other in the two models.

    answer      a stretch of trained tokens, counted from its own start: what stands before it differs
    positional  token i of an answer faces token i of the same answer
    extended    the smallest groups of tokens at whose ends both answers have read the same text

An untrained BOS or prompt is in no answer, nor is a leading token that only one side has, where the batch's
chunks say so.

A token's probability stands at the row before it ("bayesian"); the other published strategy, "observed",
reads the row of the token itself, one too late, and is kept as it is. Of a group one row's distribution
speaks, times the probabilities of its other tokens:

    bayesian    the row that predicts the last token, times the probabilities of those before
    observed    the row of the first token, times what the rows of those behind give to their own tokens

Source: the loss of TRL's GOLD trainer (Patiño et al. 2025).

Dimensions: B documents, T student positions, S teacher positions, L either, C slots (T + S), N pairs or
groups, M tokens of groups that are not their base.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.chunk_likelihood import Spans
from tokenkit.losses.options import Strategy
from tokenkit.losses.score import RowPairs, aligned_chunks, check_ids
from tokenkit.structs import Batch, ChunkKind, Side


class Scalars(NamedTuple):
    """Tokens whose probability multiplies a group's distribution, of one side."""

    row_M: Tensor
    """int64 rows of [B·L, D] that give it."""
    target_M: Tensor
    """int64 ids."""
    group_M: Tensor
    """int64, which of the N groups."""


class Groups(NamedTuple):
    """Groups of tokens that face each other, documents in order."""

    rows: RowPairs
    """The rows whose distributions speak."""
    student: Scalars
    teacher: Scalars
    document_N: Tensor
    """int64 document of each group."""


def answer_tokens(batch: Batch, kind: ChunkKind) -> tuple[Tensor, Tensor]:
    """Return [B, T] and [B, S] bool: the tokens of answers.

    A token at the very start that only one side has (BOS, mostly) is left out, where the batch has chunks.
    """
    masks = []
    chunks = batch.chunks.get(kind)
    sides = (batch.student, batch.teacher)
    ids = (None, None) if chunks is None else (chunks.student_BT, chunks.teacher_BS)
    for side, chunk_BL in zip(sides, ids, strict=True):
        position_L = torch.arange(side.ids_BT.shape[1], device=side.ids_BT.device)
        mask_BL = side.trained_BT & (position_L < side.length_B[:, None])
        if chunk_BL is not None:
            has_begun_BL = (chunk_BL >= 0).cummax(1).values
            mask_BL = mask_BL & (has_begun_BL | ~has_begun_BL[:, -1:])
        check_ids(side, mask_BL)
        masks.append(mask_BL)
    return masks[0], masks[1]


def without_last(answer_BL: Tensor) -> Tensor:
    """Leave the last token of each answer out: where it ends in EOS, that."""
    return answer_BL & torch.nn.functional.pad(answer_BL[:, 1:], (0, 1))


def by_position(student_BT: Tensor, teacher_BS: Tensor) -> RowPairs:
    """Return the tokens that face each other: token i of answer k of a document, on both sides.

    Waits for the device that the masks are on.

    Args:
        student_BT: bool, the student's answers.
        teacher_BS: bool, the teacher's.

    Returns:
        Flat positions of tokens in [B·T] and [B·S], not yet of the rows that predict them.
    """
    stride = max(student_BT.shape[1], teacher_BS.shape[1]) + 1
    key_N, key_M = (_places(mask, stride) for mask in (student_BT, teacher_BS))
    student_N, teacher_M = (mask.flatten().nonzero()[:, 0] for mask in (student_BT, teacher_BS))
    if not len(key_M):
        return RowPairs(student_N[:0], teacher_M)
    found_N = torch.searchsorted(key_M, key_N).clamp_max(len(key_M) - 1)
    faces_N = key_M[found_N] == key_N
    return RowPairs(student_N[faces_N], teacher_M[found_N[faces_N]])


def _places(mask_BL: Tensor, stride: int) -> Tensor:
    """Return for each token of an answer, in order, a number of its document, answer and place; they rise."""
    B, L = mask_BL.shape
    position_L = torch.arange(L, device=mask_BL.device)
    starts_BL = mask_BL & ~torch.nn.functional.pad(mask_BL[:, :-1], (1, 0))
    start_BL = position_L.where(starts_BL, -1).cummax(1).values
    answer_BL = starts_BL.cumsum(1)
    document_B1 = torch.arange(B, device=mask_BL.device)[:, None]
    return ((document_B1 * stride + answer_BL) * stride + position_L - start_BL)[mask_BL]


def positional_groups(student_BT: Tensor, teacher_BS: Tensor, strategy: Strategy) -> Groups:
    """Return groups of one token, `by_position`; with "bayesian", those that a row predicts on both sides."""
    T, S = student_BT.shape[1], teacher_BS.shape[1]
    student_N, teacher_N = by_position(student_BT, teacher_BS)
    if strategy == "bayesian":
        is_predicted_N = (student_N % T > 0) & (teacher_N % S > 0)
        student_N, teacher_N = student_N[is_predicted_N] - 1, teacher_N[is_predicted_N] - 1
    none = Scalars(student_N[:0], student_N[:0], student_N[:0])
    return Groups(RowPairs(student_N, teacher_N), none, none, student_N // T)


def extended_groups(
    batch: Batch, kind: ChunkKind, student_BT: Tensor, teacher_BS: Tensor, strategy: Strategy
) -> Groups:
    """Return the groups at whose ends both answers have read the same text, and one of what is behind them.

    What is behind the last common end, on both sides, is a group too, as published. With "bayesian" a group
    is left out of which a token is the first of its document: no row predicts it. Waits for the
    device that all is on.

    Args:
        batch: with chunks of that kind, the smallest that are to be groups.
        kind: which chunks.
        student_BT: bool, the student's answers.
        teacher_BS: bool, the teacher's.
        strategy: which row speaks for a group.
    """
    layout = aligned_chunks(batch, kind)
    sides = ((layout.student, student_BT), (layout.teacher, teacher_BS))
    closed_BC = layout.valid_BC
    for spans, mask_BL in sides:
        closed_BC = closed_BC & mask_BL.gather(1, spans.last_BC.where(layout.valid_BC, 0))
    slots = [_slots(spans, mask_BL, closed_BC) for spans, mask_BL in sides]
    none = closed_BC.shape[1] + 1
    kept_BC = torch.ones_like(torch.nn.functional.pad(closed_BC, (0, 2)))
    for slot_BL in slots:
        has_token_BC = torch.zeros_like(kept_BC).scatter(1, slot_BL, True)
        kept_BC = kept_BC & has_token_BC
    if strategy == "bayesian":
        for slot_BL in slots:
            kept_BC = kept_BC.scatter(1, slot_BL[:, :1], False)
    kept_BC[:, none] = False
    found = [
        _members(slot_BL, side, kept_BC, strategy)
        for slot_BL, side in zip(slots, (batch.student, batch.teacher), strict=True)
    ]
    (student_N, student), (teacher_N, teacher) = found
    return Groups(RowPairs(student_N, teacher_N), student, teacher, kept_BC.nonzero()[:, 0])


def _slots(spans: Spans, mask_BL: Tensor, closed_BC: Tensor) -> Tensor:
    """Return each token's slot: of a chunk that both answers close, C behind the last of them, else C + 1."""
    C = closed_BC.shape[1]
    position_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    is_closed_BL = mask_BL & torch.nn.functional.pad(closed_BC, (0, 1)).gather(1, spans.slot_BL)
    end_B1 = spans.last_BC.where(closed_BC, -1).amax(1, keepdim=True)
    behind_BL = torch.full_like(spans.slot_BL, C + 1).masked_fill(mask_BL & (position_L > end_B1), C)
    return spans.slot_BL.where(is_closed_BL, behind_BL)


def _members(slot_BL: Tensor, side: Side, kept_BC: Tensor, strategy: Strategy) -> tuple[Tensor, Scalars]:
    """Return the rows that speak for the groups of one side, and the tokens that multiply them."""
    B, L = slot_BL.shape
    position_BL = torch.arange(L, device=slot_BL.device).expand(B, L)
    start = torch.full(kept_BC.shape, L if strategy == "observed" else -1, device=slot_BL.device)
    base_BC = start.scatter_reduce(1, slot_BL, position_BL, "amin" if strategy == "observed" else "amax")
    before = 0 if strategy == "observed" else 1
    document_B1 = torch.arange(B, device=slot_BL.device)[:, None]
    row_N = (document_B1 * L + base_BC - before)[kept_BC]
    group_BC = (kept_BC.flatten().cumsum(0) - 1).view(kept_BC.shape)
    other_BL = kept_BC.gather(1, slot_BL) & (position_BL != base_BC.gather(1, slot_BL))
    token_M = other_BL.flatten().nonzero()[:, 0]
    group_M = group_BC.gather(1, slot_BL).flatten()[token_M]
    return row_N, Scalars(token_M - before, side.ids_BT.flatten()[token_M], group_M)
