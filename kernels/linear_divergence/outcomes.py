"""Which ids of two vocabularies face each other in a divergence: the columns of both models' logits.

    identity     student id v, teacher id v                    softmax over all ids
    map          student id v, teacher id index[v]             softmax over the gathered ids
    pairs        student id s[k], teacher id t[k]              softmax over the P pairs
    whole        pairs or map, under the full vocabularies     softmax over all ids of each model

    columns of either model:   [ P that face each other, in order | ids in no pair, ascending ]

The second stretch exists in `whole` alone; there an id that stands in c pairs has c columns, each with
1/c of its share in the log-sum-exp. A process that holds a shard of the student's rows has those pairs whose
student id it holds, and a like part of the teacher's ids in no pair.

Dimensions: V student and W teacher vocabulary, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels import deferred
from tokenkit.kernels.head.products import Rows
from tokenkit.kernels.head.sharded import local_rows, vocab_size
from tokenkit.structs import Head


class Outcomes(NamedTuple):
    """The columns of a divergence. Made by `match_outcomes`."""

    student_rows: Rows
    """Rows of the student's weight, of this process."""
    teacher_rows: Rows
    pairs: int
    """How many columns face each other; the rest are ids in no pair."""
    student_share_P: Tensor | None
    """−log c of a column whose id stands in c pairs, float64; None where no id stands in two."""
    teacher_share_P: Tensor | None
    unpaired: tuple[int, int]
    """Student and teacher ids in no pair, over all processes."""
    repeats: bool
    """Whether a student id may have several columns."""
    whole: bool | None
    """Whether probabilities are those under the full vocabularies; None: of all ids, so both are one."""


def match_outcomes(
    student_head: Head,
    teacher_head: Head,
    *,
    teacher_index: Tensor | None = None,
    student_index: Tensor | None = None,
    whole: bool = False,
) -> Outcomes:
    """Find the columns of a divergence. With `student_index` or `whole` it waits for the device once.

    Args:
        student_head: vocabulary, and which of its rows are here.
        teacher_head: the same; a shard only with neither index, and with the rows of the student's.
        teacher_index: int64 teacher ids: [V] a map, or [P] with `student_index`.
        student_index: int64 [P] student ids.
        whole: probabilities under the full vocabularies.

    Raises:
        ValueError: if an index is empty, out of range, of the wrong length or dtype, or heads do not fit.
    """
    start, end = local_rows(student_head)
    if teacher_index is None:
        if student_index is not None:
            raise ValueError("student_index says which ids are paired, so teacher_index must be given too")
        _check_identity(student_head, teacher_head)
        offset = 0 if teacher_head.shard is None else start
        rows = slice(0, end - start), slice(start - offset, end - offset)
        return Outcomes(rows[0], rows[1], end - start, None, None, (0, 0), repeats=False, whole=None)
    _check_index(student_head, teacher_head, teacher_index, student_index)
    teacher_index = _in_range(teacher_index, vocab_size(teacher_head))
    if student_index is not None:
        student_index = _in_range(student_index, vocab_size(student_head))
    if not whole and student_index is None:
        return Outcomes(
            slice(0, end - start),
            teacher_index[start:end],
            end - start,
            None,
            None,
            (0, 0),
            repeats=False,
            whole=False,
        )
    if student_index is None:
        student_index = torch.arange(len(teacher_index), device=teacher_index.device)
    return _pairs(student_head, teacher_head, student_index, teacher_index, whole=whole)


def _pairs(
    student_head: Head, teacher_head: Head, student_index: Tensor, teacher_index: Tensor, *, whole: bool
) -> Outcomes:
    start, end = local_rows(student_head)
    sizes = vocab_size(student_head), vocab_size(teacher_head)
    counts = [
        torch.bincount(index, minlength=size)
        for index, size in zip((student_index, teacher_index), sizes, strict=True)
    ]
    facts = torch.stack([*((count == 0).sum() for count in counts), *(count.max() for count in counts)])
    unpaired_student, unpaired_teacher, most_student, most_teacher = facts.tolist()
    here: slice | Tensor = slice(None)
    if student_head.shard is not None:
        here = (student_index >= start) & (student_index < end)
    shares: list[Tensor | None] = [
        -count[index[here]].double().log() if whole and most > 1 else None
        for count, index, most in zip(
            counts, (student_index, teacher_index), (most_student, most_teacher), strict=True
        )
    ]
    student_rows, teacher_rows = student_index[here] - start, teacher_index[here]
    pairs = len(student_rows)
    if whole:
        rest_student, rest_teacher = (torch.nonzero(count == 0)[:, 0] for count in counts)
        if student_head.shard is not None:
            group = student_head.shard.group
            rest_student = rest_student[(rest_student >= start) & (rest_student < end)]
            rest_teacher = rest_teacher[group.rank() :: group.size()]
        student_rows = torch.cat([student_rows, rest_student - start])
        teacher_rows = torch.cat([teacher_rows, rest_teacher])
    unpaired = (unpaired_student, unpaired_teacher) if whole else (0, 0)
    return Outcomes(
        student_rows,
        teacher_rows,
        pairs,
        shares[0],
        shares[1],
        unpaired,
        repeats=most_student > 1,
        whole=whole,
    )


def _check_identity(student_head: Head, teacher_head: Head) -> None:
    sizes = vocab_size(student_head), vocab_size(teacher_head)
    if sizes[0] != sizes[1]:
        raise ValueError(
            "student_head and teacher_head must have the same vocab_size where teacher_index is None: got "
            f"{sizes[0]} and {sizes[1]}; give teacher_index, or vocab_size where rows are padding"
        )
    if teacher_head.shard is None:
        return
    shares_group = student_head.shard is not None and student_head.shard.group is teacher_head.shard.group
    if not shares_group or local_rows(student_head) != local_rows(teacher_head):
        raise ValueError(
            "teacher_head.shard must be of the group of student_head.shard and hold the same ids "
            f"{local_rows(student_head)}: got {local_rows(teacher_head)}; logits of ids on different "
            "processes cannot be compared without sending them: divide both heads alike, or replicate the "
            "teacher's"
        )


def _check_index(
    student_head: Head, teacher_head: Head, teacher_index: Tensor, student_index: Tensor | None
) -> None:
    if teacher_head.shard is not None:
        raise ValueError(
            "teacher_head.shard must be None where teacher_index is given: the ids of a pair would lie on "
            "different processes; replicate the frozen teacher's head"
        )
    indices = {"teacher_index": (teacher_index, vocab_size(teacher_head))}
    if student_index is not None:
        indices["student_index"] = student_index, vocab_size(student_head)
    for name, (index, size) in indices.items():
        if index.dtype != torch.int64 or index.ndim != 1 or len(index) == 0:
            raise ValueError(
                f"{name} must be int64 ids, at least one: got {index.dtype} of shape {tuple(index.shape)}"
            )
        if index.device != student_head.weight_VD.device:
            raise ValueError(
                f"{name} must be on {student_head.weight_VD.device}, where the heads are: got {index.device}"
            )
        _check_range(name, index, size)
    expected = vocab_size(student_head) if student_index is None else len(student_index)
    if len(teacher_index) != expected:
        what = "student id" if student_index is None else "pair, as student_index does"
        raise ValueError(
            f"teacher_index must hold one id per {what} ({expected}): got shape {tuple(teacher_index.shape)}"
        )


def _check_range(name: str, index: Tensor, size: int) -> None:
    words = f"{name} must hold ids in [0, {size})"

    def error(row: int) -> ValueError:
        low, high = torch.aminmax(index)
        return ValueError(f"{words}: got {int(low)} to {int(high)}; are they ids of the other model?")

    deferred.require((index >= 0) & (index < size), words, ValueError, error)


def _in_range(index: Tensor, size: int) -> Tensor:
    """Return ids that may be looked up: where nobody waited for the check, others are clamped."""
    return index if deferred.waits(index) else index.clamp(0, size - 1)
