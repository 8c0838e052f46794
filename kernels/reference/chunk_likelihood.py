"""The definition of `kernels/chunk_likelihood.py`, one row at a time, in plain Python lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Chunk(NamedTuple):
    """Positions of a chunk's tokens on both sides, and whether a loss may look at it."""

    student: list[int]
    teacher: list[int]
    valid: bool


def lay_out(
    student_chunk: Sequence[int],
    teacher_chunk: Sequence[int],
    student_scored: Sequence[bool],
    teacher_scored: Sequence[bool],
    slots: int,
) -> list[Chunk]:
    """Return the chunks of a row by id, empty ones where an id is missing; ids past `slots` are ranked."""
    chunks = []
    names = sorted({*student_chunk, *teacher_chunk} - {-1})
    for name in range(names[-1] + 1) if names and names[-1] < slots else names:
        student = [i for i, chunk in enumerate(student_chunk) if chunk == name]
        teacher = [i for i, chunk in enumerate(teacher_chunk) if chunk == name]
        scored = [student_scored[i] for i in student] + [teacher_scored[i] for i in teacher]
        chunks.append(Chunk(student, teacher, bool(student and teacher and all(scored))))
    return chunks


def join(chunks: Sequence[Chunk], closes: Sequence[bool]) -> list[Chunk]:
    """Join neighbouring valid chunks until one closes."""
    joined: list[Chunk] = []
    is_open = False
    for chunk, closing in zip(chunks, closes, strict=True):
        joined[-1:] = [_merge([joined[-1], chunk])] if is_open and chunk.valid else [*joined[-1:], chunk]
        is_open = chunk.valid and not closing
    return joined


def group(chunks: Sequence[Chunk], size: int) -> list[Chunk]:
    """Make one chunk of the valid ones among each `size` neighbours."""
    groups = [chunks[start : start + size] for start in range(0, len(chunks), size)]
    return [_merge([chunk for chunk in members if chunk.valid]) for members in groups]


def _merge(chunks: Sequence[Chunk]) -> Chunk:
    student = [i for chunk in chunks for i in chunk.student]
    return Chunk(student, [i for chunk in chunks for i in chunk.teacher], bool(chunks))


def chunk_likelihood(logp_L: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return min(0, Σ logp) over the chunk's tokens of one side."""
    return logp_L[list(tokens)].sum().clamp_max(0)
