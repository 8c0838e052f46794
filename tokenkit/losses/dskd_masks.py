"""Who may attend to whom in DSKD: scored positions, and causally only to text that both have read.

Dimensions: B documents, T student positions, S teacher positions, L either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenkit.losses.score import chunks_of, scored_tokens
from tokenkit.structs import Batch


@dataclass(frozen=True, slots=True)
class Masks:
    """Who may attend to whom, [B, T − 1, S − 1] bool or broadcast to it, and which positions are scored."""

    to_teacher: Tensor
    to_student: Tensor
    student_BT: Tensor
    """[B, T − 1]: positions whose next token is scored, and that have something to attend to."""
    teacher_BS: Tensor


def attend(score: Tensor, mask: Tensor) -> Tensor:
    """Softmax over what the mask allows; uniform where it allows nothing, which is never scored."""
    return score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(-1)


def attention_masks(batch: Batch, causal: bool) -> Masks:
    """Scored positions attend to scored positions; causally, to text that they have read."""
    student_BT, teacher_BS = (scored_tokens(side)[:, 1:] for side in (batch.student, batch.teacher))
    both = student_BT[:, :, None] & teacher_BS[:, None, :]
    to_teacher = to_student = both
    if causal:
        chunks = chunks_of(batch, "unconstrained")
        student, teacher = chunks.student_BT[:, :-1], chunks.teacher_BS[:, :-1]
        read_BT, read_BS = _read(chunks.student_BT)[:, :-1], _read(chunks.teacher_BS)[:, :-1]
        needs_BT, needs_BS = _needs(student), _needs(teacher)
        to_teacher = both & (needs_BS[:, None, :] <= read_BT[:, :, None])
        to_student = both & (needs_BT[:, :, None] <= read_BS[:, None, :])
    return Masks(to_teacher, to_student, to_teacher.any(2), to_student.any(1))


def _read(chunk_BL: Tensor) -> Tensor:
    """Return the last chunk that has ended by each position, or -1: its last token is there or before."""
    later_BL = _needs(torch.nn.functional.pad(chunk_BL[:, 1:], (0, 1), value=-1))
    ended_BL = (chunk_BL >= 0) & (later_BL > chunk_BL)
    return chunk_BL.long().where(ended_BL, -1).cummax(1).values


def _needs(chunk_BL: Tensor) -> Tensor:
    """Return the chunk that must have ended before a token is read: its own, or the next for one in none."""
    none = torch.iinfo(torch.int64).max
    known_BL = chunk_BL.long().where(chunk_BL >= 0, none)
    return known_BL.flip(1).cummin(1).values.flip(1)
