"""Likelihoods of chunks: sums of token log-probabilities over stretches of a row, and how chunks join.

    row        y_0  y_1 y_2 y_3  y_4  ...        one document's tokens, one side
    chunk id    -     7   7   7    9   ...       ids rise from left to right; none: -1
    slot        -     0   0   0    1   ...       the id's rank among all ids of the row, either side's
    likelihood_C = min(0, Σ_{i in C} logp_i) + a_C,      ∂/∂logp_i = the upstream of i's chunk

A slot's tokens are a stretch [start, end) of the row, so its sum needs no atomics and repeats bit for bit.
A chunk is valid when it has tokens on both sides and every one of them is scored. Joins make stretches of
stretches: `join` until the teacher expects whitespace, `group` by slot // size. An id that no token has is an
empty slot, hence an invalid chunk: text that was left out parts its neighbours. Nothing waits for the device:
there are T + S slots in a row, most of them empty, and memory is O(tokens).

Dimensions: B documents, T student positions, S teacher positions, L either, C slots = T + S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, refuse_forward_mode, runs_triton

BLOCK_C = 128  # slots of one program


class Spans(NamedTuple):
    """Where the slots of one side lie."""

    start_BC: Tensor
    """int64 position of the first token."""
    end_BC: Tensor
    """int64 position just past the last token; equal to the start where the slot is empty."""
    last_BC: Tensor
    """int64 position of the last token that belongs to a valid chunk; meaningless where not valid."""
    slot_BL: Tensor
    """int64 slot of each token; C: in no chunk."""


class Layout(NamedTuple):
    """The chunks of a batch."""

    student: Spans
    teacher: Spans
    valid_BC: Tensor
    """bool: tokens on both sides, all of them scored."""
    teacher_tokens_BC: Tensor
    """int64, the teacher's tokens of valid chunks; 0 elsewhere."""


@triton.jit
def _span_sum_kernel(
    value_ptr, start_ptr, end_ptr, total_ptr,
    L, C, count,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_C slots of the batch: add up each slot's stretch of its row."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < count
    start = tl.load(start_ptr + offs_c, mask=mask, other=0)
    length = tl.load(end_ptr + offs_c, mask=mask, other=0) - start
    first_ptr = value_ptr + (offs_c // C) * L + start
    total = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(0, tl.max(length, axis=0)):
        total += tl.load(first_ptr + i, mask=mask & (i < length), other=0.0)
    tl.store(total_ptr + offs_c, total, mask=mask)


@torch.library.custom_op("tokenkit::span_sum", mutates_args=())
def _span_sum(value_BL: Tensor, start_BC: Tensor, end_BC: Tensor, slot_BL: Tensor) -> Tensor:
    """Return [B, C], the sum of each stretch of its row; `slot_BL` is for the backward."""
    B, L = value_BL.shape
    C = start_BC.shape[1]
    if runs_triton(value_BL) and B * C:
        total_BC = torch.empty_like(start_BC, dtype=value_BL.dtype)
        with on_device(value_BL):
            _span_sum_kernel[(triton.cdiv(B * C, BLOCK_C),)](
                value_BL.contiguous(), start_BC, end_BC, total_BC,
                L, C, B * C, BLOCK_C=BLOCK_C,
            )  # fmt: skip
        return total_BC
    # float64, because differences of a row's running sum would leave float32 with four digits; what is not
    # finite is counted apart, because it would stay in the running sum to the row's end
    is_finite_BL = value_BL.isfinite()
    total_BC = _difference(value_BL.double().where(is_finite_BL, 0), start_BC, end_BC)
    impossible_BC = _difference((value_BL == -torch.inf).double(), start_BC, end_BC)
    broken_BC = _difference((~is_finite_BL & (value_BL != -torch.inf)).double(), start_BC, end_BC)
    total_BC = total_BC.masked_fill(impossible_BC > 0, -torch.inf).masked_fill(broken_BC > 0, torch.nan)
    return total_BC.to(value_BL.dtype)


def _difference(value_BL: Tensor, start_BC: Tensor, end_BC: Tensor) -> Tensor:
    """Return the sum of each stretch as a difference of the row's running sum."""
    running_BL = torch.nn.functional.pad(value_BL.cumsum(1), (1, 0))
    return running_BL.gather(1, end_BC) - running_BL.gather(1, start_BC)


@_span_sum.register_fake
def _(value_BL: Tensor, start_BC: Tensor, end_BC: Tensor, slot_BL: Tensor) -> Tensor:
    return torch.empty_like(start_BC, dtype=value_BL.dtype)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[3])


def _differentiate(ctx: Any, dtotal_BC: Tensor) -> tuple[Tensor, None, None, None]:
    (slot_BL,) = ctx.saved_tensors
    return torch.nn.functional.pad(dtotal_BC, (0, 1)).gather(1, slot_BL), None, None, None


_span_sum.register_autograd(_differentiate, setup_context=_save)


def chunk_likelihood(logp_BL: Tensor, spans: Spans, append_BC: Tensor | None = None) -> Tensor:
    """Return min(0, Σ logp) of each slot, plus `append_BC`.

    Differentiable in both. Where rounding leaves a sum above 0 no gradient flows into it.

    Args:
        logp_BL: nats, float32 or float64; 0 at tokens that are in no valid chunk.
        spans: one side of a `Layout`.
        append_BC: nats, log P(whitespace comes next) at each chunk's last token.

    Raises:
        ValueError: if logp and spans differ in their number of documents or positions.
    """
    if logp_BL.shape != spans.slot_BL.shape:
        raise ValueError(
            f"logp_BL must hold one number per token {tuple(spans.slot_BL.shape)}: got {tuple(logp_BL.shape)}"
        )
    refuse_forward_mode(logp_BL, append_BC)
    total_BC = _span_sum(logp_BL, spans.start_BC, spans.end_BC, spans.slot_BL).clamp_max(0)
    return total_BC if append_BC is None else total_BC + append_BC


def lay_out(
    student_chunk_BT: Tensor, teacher_chunk_BS: Tensor, student_scored_BT: Tensor, teacher_scored_BS: Tensor
) -> Layout:
    """Find the chunks of a batch.

    Args:
        student_chunk_BT: integer id of each token's chunk, rising along a row; -1: none, also in between. Ids
            of a row should begin near 0: where they pass T + S, gaps between them count for nothing.
        teacher_chunk_BS: the same; equal ids of a row name the same chunk.
        student_scored_BT: bool, the token has a log-probability and the loss mask keeps it.
        teacher_scored_BS: the same.

    Raises:
        ValueError: if the two sides differ in their number of documents, a mask from its ids, or a side has
            no position.
    """
    shapes = [tuple(x.shape) for x in (student_chunk_BT, student_scored_BT)]
    shapes += [tuple(x.shape) for x in (teacher_chunk_BS, teacher_scored_BS)]
    if shapes[0] != shapes[1] or shapes[2] != shapes[3] or shapes[0][0] != shapes[2][0]:
        raise ValueError(f"expected ids and masks [B, T], [B, T], [B, S], [B, S]: got {shapes}")
    if not (shapes[0][1] and shapes[2][1]):
        raise ValueError(
            f"both sides must have at least one position, filled or padding: got T = {shapes[0][1]} and "
            f"S = {shapes[2][1]}"
        )
    none = torch.iinfo(torch.int64).max
    T = student_chunk_BT.shape[1]
    id_BC = torch.cat([student_chunk_BT, teacher_chunk_BS], 1).long()
    id_BC = torch.where(id_BC < 0, none, id_BC)
    sorted_BC = id_BC.sort(1).values
    rank_BC = (sorted_BC.diff(dim=1) != 0).cumsum(1)
    rank_BC = torch.nn.functional.pad(rank_BC, (1, 0))
    slot_BC = rank_BC.gather(1, torch.searchsorted(sorted_BC, id_BC).clamp_max(id_BC.shape[1] - 1))
    C = id_BC.shape[1]
    largest_B1 = torch.where(id_BC == none, -1, id_BC).amax(1, keepdim=True)
    slot_BC = torch.where(largest_B1 < C, id_BC, slot_BC)
    slot_BC = torch.where(id_BC == none, C, slot_BC)

    student, student_valid_BC, _ = _lay_side(slot_BC[:, :T], student_scored_BT, C)
    teacher, teacher_valid_BC, tokens_BC = _lay_side(slot_BC[:, T:], teacher_scored_BS, C)
    valid_BC = student_valid_BC & teacher_valid_BC
    return Layout(student, teacher, valid_BC, tokens_BC.where(valid_BC, 0))


def join(layout: Layout, closes_BC: Tensor) -> Layout:
    """Join neighbouring valid chunks until one `closes`; the slots of the result are consecutive again.

    What is left at the end of a row is one chunk, and an invalid chunk, which stays alone, closes the one
    before it.

    Args:
        layout: the chunks.
        closes_BC: bool, a new chunk starts behind this one.
    """
    valid_BC = layout.valid_BC
    goes_on_BC = valid_BC & ~closes_BC
    starts_BC = ~valid_BC | ~torch.nn.functional.pad(goes_on_BC, (1, 0))[:, :-1]
    return _regroup(layout, starts_BC.cumsum(1) - 1)


def group(layout: Layout, size: int) -> Layout:
    """Make one chunk of all valid chunks whose slots agree in slot // size.

    Raises:
        ValueError: if size is not a positive integer.
    """
    if size < 1:
        raise ValueError(f"a chunk size counts chunks and is at least 1: got {size}")
    C = layout.valid_BC.shape[1]
    if size == 1:
        return layout
    slot_C = torch.arange(C, device=layout.valid_BC.device)
    return _regroup(layout, (slot_C // size).expand_as(layout.valid_BC))


def _lay_side(slot_BL: Tensor, scored_BL: Tensor, C: int) -> tuple[Spans, Tensor, Tensor]:
    """Return spans, whether a slot has tokens and all of them are scored, and how many tokens it has."""
    inside_BL = slot_BL < C
    filled_BL = torch.where(inside_BL, slot_BL, 0).cummax(1).values
    waits = slot_BL.is_cuda or torch.compiler.is_compiling()  # looking at the ids would; neither may
    if not waits and bool((inside_BL & (filled_BL != slot_BL)).any()):
        raise ValueError("chunk ids must rise from left to right within a row: got a row where they fall")
    start_BC, end_BC = _stretches(filled_BL, C)
    tokens_BC = _count(inside_BL, start_BC, end_BC)
    scored_BC = _count(inside_BL & scored_BL, start_BC, end_BC)
    last_BC = _last_where(inside_BL).gather(1, (end_BC - 1).clamp_min(0))
    spans = Spans(start_BC, end_BC, last_BC, slot_BL.contiguous())
    return spans, (tokens_BC > 0) & (scored_BC == tokens_BC), tokens_BC


def _regroup(layout: Layout, group_BC: Tensor) -> Layout:
    """Slots that share a group become one; groups are consecutive integers that do not fall."""
    valid_BC, C = layout.valid_BC, layout.valid_BC.shape[1]
    group_BC = group_BC.contiguous()
    first_BC, after_BC = _stretches(group_BC, C)
    last_BC = _last_where(valid_BC).gather(1, (after_BC - 1).clamp_min(0))
    # from the first valid member to the last: others may be anywhere, those of no chunk with stretches of 0
    lead_BC = (C - 1 - _last_where(valid_BC.flip(1)).flip(1)).gather(1, first_BC.clamp_max(C - 1))
    new_valid_BC = (after_BC > first_BC) & (last_BC >= first_BC)
    kept_BC = torch.nn.functional.pad(group_BC.where(valid_BC, C), (0, 1), value=C)

    def regroup(spans: Spans) -> Spans:
        start_BC = spans.start_BC.gather(1, lead_BC.clamp_max(C - 1)).where(new_valid_BC, 0)
        end_BC = spans.end_BC.gather(1, last_BC.clamp_min(0)).where(new_valid_BC, 0)
        last_token_BC = spans.last_BC.gather(1, last_BC.clamp_min(0))
        return Spans(start_BC, end_BC, last_token_BC, kept_BC.gather(1, spans.slot_BL))

    running_BC = torch.nn.functional.pad(layout.teacher_tokens_BC.cumsum(1), (1, 0))
    tokens_BC = running_BC.gather(1, after_BC) - running_BC.gather(1, first_BC)
    return Layout(regroup(layout.student), regroup(layout.teacher), new_valid_BC, tokens_BC)


def _stretches(sorted_BL: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Return where each of 0 .. C-1 begins and ends in rows that do not fall."""
    slot_BC = torch.arange(C, device=sorted_BL.device).expand(len(sorted_BL), C).contiguous()
    return torch.searchsorted(sorted_BL, slot_BC), torch.searchsorted(sorted_BL, slot_BC, right=True)


def _count(mask_BL: Tensor, start_BC: Tensor, end_BC: Tensor) -> Tensor:
    running_BL = torch.nn.functional.pad(mask_BL.long().cumsum(1), (1, 0))
    return running_BL.gather(1, end_BC) - running_BL.gather(1, start_BC)


def _last_where(mask_BL: Tensor) -> Tensor:
    """Return the last position up to each one where the mask holds, or -1."""
    position_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return torch.where(mask_BL, position_L, -1).cummax(1).values
