"""What `linear_divergence` refuses, and in which words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels.divergence_rows import Problem, RowState
from tokenkit.kernels.kinds import KINDS
from tokenkit.kernels.launch import refuse_forward_mode
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.kernels.outcomes import Outcomes
from tokenkit.kernels.vocabulary_parallel import check_cover, check_head
from tokenkit.structs import Head

INFINITE = {"kl": (0,), "rkl": (1,), "akl": (0, 1), "log_abs": (0, 1)}
"""By kind, the models (0 student, 1 teacher) whose mass may not be 0 where the other's is not."""


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
        _check_side(name, hidden, head)
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
        _check_row_weight(settled["row_weight_N"], student_ND)
    if not torch.compiler.is_compiling():
        for head in (student_head, teacher_head):
            check_cover(head, student_ND.device)


def _check_row_weight(row_weight_N: Tensor, student_ND: Tensor) -> None:
    if row_weight_N.shape != student_ND.shape[:1] or row_weight_N.device != student_ND.device:
        raise ValueError(
            f"row_weight_N must hold one number per row of student_ND ({len(student_ND)}), on "
            f"{student_ND.device}: got shape {tuple(row_weight_N.shape)} on {row_weight_N.device}"
        )
    if row_weight_N.requires_grad:
        raise ValueError("row_weight_N must not require a gradient, none is formed: detach it")


def _check_side(name: str, hidden: Tensor, head: Head) -> None:
    weight = head.weight_VD
    hidden_name = f"{name}_N{'D' if name == 'student' else 'E'}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} and {name}_head.weight_VD must share their last dimension: "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if any(hasattr(x, "device_mesh") for x in (hidden, weight)):
        raise ValueError(
            f"linear_divergence takes plain tensors, and got a DTensor for the {name}: call it inside the "
            "forward of the sharded module that owns the head"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"{hidden_name} must be floating point: got {hidden.dtype}")
    for part, tensor in (("weight_VD", weight), ("bias_V", head.bias_V)):
        if tensor is None:
            continue
        if hidden.dtype != tensor.dtype:
            raise ValueError(
                f"{hidden_name} is {hidden.dtype} but {name}_head.{part} is {tensor.dtype}: "
                "cast the head once, when the model is loaded"
            )
        if hidden.device != tensor.device:
            raise ValueError(
                f"{hidden_name} is on {hidden.device} but {name}_head.{part} on {tensor.device}: "
                "move the head to its hidden states"
            )
    check_head(head, f"{name}_head")


def check_rest(outcomes: Outcomes, kind: str) -> None:
    """Raise ValueError where the ids in no pair are those of one model alone, and the kind infinite."""
    for i in INFINITE.get(kind, ()):
        if outcomes.unpaired[i] == 0:
            names = ("student", "teacher")
            raise ValueError(
                f"rest_as_outcome: every id of the {names[i]} is in a pair but {outcomes.unpaired[1 - i]} "
                f"ids of the {names[1 - i]} are not, so {kind} is infinite; use another kind, such as js"
            )


def check_finite(value_N: Tensor, state: RowState, problem: Problem) -> None:
    """Name the row that a NaN or an infinity spoils; a softcap hides it, so hidden states are read again."""
    sides = (
        ("student_ND", state.top_N + state.lse_N, problem.student),
        ("teacher_NE", state.teacher_top_N + state.teacher_lse_N, problem.teacher),
    )
    for name, lse_N, side in sides:
        is_finite_N = torch.isfinite(lse_N)
        if side.cap is not None:
            is_finite_N = is_finite_N & torch.isfinite(side.hidden_ND).all(1)
        words = f"{name} and its head must be finite"
        if lse_N.is_cuda:
            torch._assert_async(is_finite_N.all(), words)
        elif not bool(is_finite_N.all()):
            row = int(torch.nonzero(~is_finite_N)[0])
            found = "it holds NaN or infinity"
            if torch.isfinite(side.hidden_ND[row]).all():
                found = f"its log-sum-exp is {lse_N[row].item()}"
            raise NotFiniteError(f"{words}: in row {row} {found}")
    words = f"{problem.kind} must be finite: where one model gives an id no probability (a logit of -inf)"
    if value_N.is_cuda:
        torch._assert_async(value_N.isfinite().all(), words)
    elif not bool(value_N.isfinite().all()):
        row = int(torch.nonzero(~value_N.isfinite())[0])
        raise NotFiniteError(
            f"{words} the other gives it some in row {row}; use skl, srkl or js, or leave such ids out of "
            "the pairs"
        )


def check_hidden(name: str, hidden_ND: Tensor) -> None:
    """Name the row of hidden states that holds NaN or infinity. On a CPU a compiler's graph leaves it out."""
    is_finite_N = torch.isfinite(hidden_ND).all(1)
    words = f"{name} must be finite"
    if is_finite_N.is_cuda:
        torch._assert_async(is_finite_N.all(), words)
    elif not torch.compiler.is_compiling() and not bool(is_finite_N.all()):
        raise NotFiniteError(f"{words}: row {int(torch.nonzero(~is_finite_N)[0])} holds NaN or infinity")
