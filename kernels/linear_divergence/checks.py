"""What `linear_divergence` refuses, and in which words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels import deferred
from tokenkit.kernels.head.sharded import check_cover
from tokenkit.kernels.head.side import check_row_weight, check_side
from tokenkit.kernels.kinds import INFINITE, KINDS
from tokenkit.kernels.launch import refuse_forward_mode
from tokenkit.kernels.linear_divergence.outcomes import Outcomes
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.structs import Head


def check_numbers(kind: str, settled: dict[str, Any]) -> None:
    """Raise ValueError if the kind is unknown, or a number is out of its range."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}: got {kind!r}")
    for name in ("temperature", "teacher_temperature"):
        if not 0 < settled[name] < math.inf:
            raise ValueError(f"{name} must be positive and finite: got {settled[name]}")
    for name in ("skew", "alpha"):
        if not 0 <= settled[name] <= 1:
            raise ValueError(f"{name} must be in [0, 1]: got {settled[name]}")
    if kind == "akl" and settled["alpha"] == 1:
        raise ValueError("alpha must be below 1 for akl, a tail of the whole mass leaves no head: use rkl")
    has_pairs = settled["student_index"] is not None or settled["outcomes"] is not None
    if settled["rest_as_outcome"] and not has_pairs:
        raise ValueError("rest_as_outcome needs pairs: give student_index and teacher_index, or outcomes")
    indices = (settled["teacher_index"], settled["student_index"])
    if settled["outcomes"] is not None and indices != (None, None):
        raise ValueError("outcomes are made of teacher_index and student_index: give one or the other")
    if settled["workspace_bytes"] < 0:
        raise ValueError(f"workspace_bytes must be at least 0: got {settled['workspace_bytes']}")


def check_sides(
    student_ND: Tensor, student_head: Head, teacher_NE: Tensor, teacher_head: Head, settled: dict[str, Any]
) -> None:
    """Raise ValueError if shapes, dtypes or devices do not fit together, or the teacher's head is trained."""
    refuse_forward_mode(student_ND, student_head.weight_VD, student_head.bias_V, teacher_NE)
    for name, hidden, head in (("student", student_ND, student_head), ("teacher", teacher_NE, teacher_head)):
        check_side(f"{name}_N{'D' if name == 'student' else 'E'}", hidden, head, f"{name}_head")
    if len(teacher_NE) != len(student_ND):
        raise ValueError(
            f"teacher_NE must have the rows of student_ND ({len(student_ND)}): got {len(teacher_NE)}"
        )
    if teacher_NE.device != student_ND.device:
        raise ValueError(f"teacher_NE must be on {student_ND.device}, as student_ND: got {teacher_NE.device}")
    if (teacher_NE.dtype == torch.float64) != (student_ND.dtype == torch.float64):
        raise ValueError(
            f"float64 needs both models in float64: student_ND is {student_ND.dtype}, "
            f"teacher_NE is {teacher_NE.dtype}"
        )
    if any(x is not None and x.requires_grad for x in (teacher_head.weight_VD, teacher_head.bias_V)):
        raise ValueError(
            "teacher_head must be frozen, and its weight or bias requires a gradient: detach them"
        )
    if settled["row_weight_N"] is not None:
        check_row_weight(settled["row_weight_N"], student_ND)
    if not torch.compiler.is_compiling():
        for head in (student_head, teacher_head):
            check_cover(head, student_ND.device)


def check_rest(outcomes: Outcomes, kind: str) -> None:
    """Raise ValueError where the ids in no pair are those of one model alone, and the kind infinite."""
    for i in INFINITE.get(kind, ()):
        if outcomes.unpaired[i] == 0:
            names = ("student", "teacher")
            raise ValueError(
                f"rest_as_outcome: every id of the {names[i]} is in a pair but {outcomes.unpaired[1 - i]} "
                f"ids of the {names[1 - i]} are not, so {kind} is infinite; use another kind, such as js"
            )


def check_values(value_N: Tensor, kind: str) -> None:
    """Name the row whose divergence is infinite."""
    words = f"{kind} must be finite: where one model gives an id no probability (a logit of -inf)"
    advice = "use skl, srkl or js, or leave such ids out of the pairs"

    def error(row: int) -> NotFiniteError:
        return NotFiniteError(f"{words} the other gives it some in row {row}; {advice}")

    deferred.require(value_N.isfinite(), f"{words} the other gives it some; {advice}", NotFiniteError, error)
