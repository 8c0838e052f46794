"""Distance of two models' distributions of a merged token: matched ids face each other, the others by rank.

    P = c p,  Q = d q       p = softmax(z_s / T), q = softmax(z_t / T'); c, d: one factor a row, 1 at most
    value = α Σ_k F(max(P_s(k), ε), max(Q_t(k), ε)) + γ Σ_r |P_(r) − Q_(r)|

    F     β = 0   b (log b − log a)                        a the student's, b the teacher's, ε = 1e-8
          β = 1   a (log a − log b)
          else    β b (log b − log m) + (1 − β) a (log a − log m),   m = β b + (1 − β) a
    r     rank among the ids of no pair, of both models; the shorter list goes on with zeros

    ∂value / ∂z_v = P_v G_v − p_v Σ_u P_u G_u,   ∂value / ∂log c = Σ_u P_u G_u,   G = ∂value / ∂P

Neither P nor Q adds up to 1, and F is taken of each pair as it is: no divergence of distributions, but what
is published. Without pairs every id is ranked. Where one model has no id outside them, γ's part is 0.

A few whole rows of both models' logits exist at a time, as many as fit into `workspace_bytes`; because the
weights of the rows are known, gradients are formed on the way and no logits are computed twice.

Source: the loss of TRL's GOLD trainer (Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model
Family"); β: Agarwal et al., arXiv:2306.13649, eq. 1; ranks: arXiv:2402.12030.

Dimensions: N rows, V student and W teacher vocabulary, P pairs, D and E hidden sizes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head.call import head_fields, head_of, pack, unpack, wanted
from tokenkit.kernels.head.formed import formed_shapes, register_formed
from tokenkit.kernels.head.logits import slope
from tokenkit.kernels.head.products import Gradients
from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.head.side import Side, side_of
from tokenkit.kernels.head.tiles import Buffer, chunks
from tokenkit.kernels.launch import refuse_forward_mode
from tokenkit.kernels.linear_divergence.checks import check_sides
from tokenkit.kernels.sorted_distance import tile
from tokenkit.kernels.sorted_distance.exact import compare_sorted, sort_memory, sorts
from tokenkit.kernels.sorted_distance.rows import whole_logits
from tokenkit.structs import Head

DEFAULT_WORKSPACE_BYTES = 2**30
FLOOR = 1e-8  # ε, of TRL
LEAST = 1e-30  # of the largest P of a row: below it the edges of bins are no normal float32


class Pairs(NamedTuple):
    """Which columns face each other, and which are ranked. Made by `split_columns`."""

    student_P: Tensor
    """int64 ids."""
    teacher_P: Tensor
    student_rest: Tensor
    """int64 ids in no pair."""
    teacher_rest: Tensor


class Measure(NamedTuple):
    """How rows are compared."""

    matched_weight: float = 0.0
    """α."""
    unmatched_weight: float = 1.0
    """γ."""
    beta: float = 0.5
    exact: bool | None = True
    """Sort, instead of adding up histograms; None: as `sorted_distance` does."""
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    """T', not a multiple of T."""
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES


def split_columns(
    student_head: Head, teacher_head: Head, student_index: Tensor, teacher_index: Tensor
) -> Pairs:
    """Return the columns of a hybrid distance. Waits for the device.

    Args:
        student_head: its vocabulary.
        teacher_head: the same.
        student_index: int64 [P] student ids, none twice.
        teacher_index: int64 [P] their partners, none twice.

    Raises:
        ValueError: an id out of range, or twice.
    """
    device = student_head.weight_VD.device
    found = []
    for name, index_P, head in (
        ("student_index", student_index, student_head),
        ("teacher_index", teacher_index, teacher_head),
    ):
        index_P, size = index_P.to(device), vocab_size(head)
        if len(index_P) and not 0 <= int(index_P.min()) <= int(index_P.max()) < size:
            raise ValueError(
                f"{name} must hold ids in [0, {size}): got {int(index_P.min())} to {int(index_P.max())}; "
                "are they ids of the other model?"
            )
        is_free_V = torch.ones(size, dtype=torch.bool, device=device)
        is_free_V[index_P] = False
        rest = is_free_V.nonzero()[:, 0]
        if len(rest) + len(index_P) != size:
            raise ValueError(f"{name} names an id twice: matched tokens face each other one to one")
        found.append((index_P, rest))
    return Pairs(found[0][0], found[1][0], found[0][1], found[1][1])


def _matched(a_NP: Tensor, b_NP: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return Σ F of each row and P ∂F/∂P of each pair."""
    is_above_NP = a_NP >= FLOOR
    s_NP, t_NP = a_NP.clamp_min(FLOOR), b_NP.clamp_min(FLOOR)
    if beta == 0:
        ahead_NP = (t_NP / s_NP).log_()
        return (t_NP * ahead_NP).sum(1), torch.where(is_above_NP, -t_NP, 0)
    if beta == 1:
        ahead_NP = (s_NP / t_NP).log_()
        return (s_NP * ahead_NP).sum(1), ahead_NP.add_(1).mul_(s_NP).mul_(is_above_NP)
    m_NP = torch.lerp(s_NP, t_NP, beta)
    ahead_NP = (s_NP / m_NP).log_().mul_(s_NP).mul_(1 - beta)
    value_N = ahead_NP.sum(1) + beta * (t_NP / m_NP).log_().mul_(t_NP).sum(1)
    return value_N, ahead_NP.mul_(is_above_NP)


def _ranked(
    z_NV: Tensor, softmax: tile.Softmax, z_NW: Tensor, teacher_softmax: tile.Softmax, exact: bool
) -> tuple[Tensor, Tensor]:
    """Return Σ |P_(r) − Q_(r)| of each row and P times its sign of each column; z_NW may be overwritten."""
    if exact:
        value_N = torch.empty_like(softmax.max_N)
        pull_NV = torch.empty_like(z_NV)
        compare_sorted((z_NV, z_NW), (softmax, teacher_softmax), value_N, pull_NV)
        return value_N, pull_NV
    foot_N = tile.foot(torch.maximum(softmax.inverse_N, teacher_softmax.inverse_N).clamp_min(LEAST))
    own = tile.histogram(z_NV, softmax, foot_N)
    difference = tile.histogram(z_NW, teacher_softmax, foot_N).neg_().add_(own)
    value_N, sign_NB, mean_N = tile.merge(own, difference, foot_N, z_NV.dtype)
    row = tile.RowFactors(*softmax, foot_N, torch.zeros_like(mean_N), torch.ones_like(mean_N))
    pull_NV = torch.empty_like(z_NV)
    tile.dlogits(z_NV, row, sign_NB, None, pull_NV)
    return value_N, pull_NV


def _compare(
    z_NV: Tensor,
    softmax: tile.Softmax,
    z_NW: Tensor,
    teacher_softmax: tile.Softmax,
    pairs: Pairs | None,
    measure: Measure,
) -> tuple[Tensor, Tensor]:
    """Return value_N and P G of each column. z_NV is kept, z_NW may be overwritten."""
    if pairs is None:
        value_N, pull_NV = _ranked(z_NV, softmax, z_NW, teacher_softmax, bool(measure.exact))
        return measure.unmatched_weight * value_N, pull_NV.mul_(measure.unmatched_weight)
    value_N, pull_NV = torch.zeros_like(softmax.max_N), torch.zeros_like(z_NV)
    if len(pairs.student_P):
        a_NP = _probabilities(z_NV.index_select(1, pairs.student_P), softmax)
        b_NP = _probabilities(z_NW.index_select(1, pairs.teacher_P), teacher_softmax)
        matched_N, pull_NP = _matched(a_NP, b_NP, measure.beta)
        value_N += measure.matched_weight * matched_N
        pull_NV.index_copy_(1, pairs.student_P, pull_NP.mul_(measure.matched_weight))
    if len(pairs.student_rest) and len(pairs.teacher_rest):
        ranked_N, pull_NU = _ranked(
            z_NV.index_select(1, pairs.student_rest),
            softmax,
            z_NW.index_select(1, pairs.teacher_rest),
            teacher_softmax,
            bool(measure.exact),
        )
        value_N += measure.unmatched_weight * ranked_N
        pull_NV.index_copy_(1, pairs.student_rest, pull_NU.mul_(measure.unmatched_weight))
    return value_N, pull_NV


def _probabilities(z_NV: Tensor, softmax: tile.Softmax) -> Tensor:
    """Write over z what it stands for."""
    return z_NV.sub_(softmax.max_N[:, None]).exp_().mul_(softmax.inverse_N[:, None])


def _scaled(softmax: tile.Softmax, log_scale_N: Tensor) -> tile.Softmax:
    return softmax._replace(inverse_N=softmax.inverse_N * log_scale_N.exp())


class _Rows(NamedTuple):
    """What is known of each row, [N] each."""

    log_scale_N: Tensor
    teacher_log_scale_N: Tensor
    weight_N: Tensor


def _run(
    sides: tuple[Side, Side], rows_N: _Rows, pairs: Pairs | None, needs: str, measure: Measure
) -> list[Tensor]:
    """Return the weighted sum, and its gradients by x, w and b, empty where unwanted, and by log c."""
    student, teacher = sides
    dtype, cap = student.dtype, student.cap
    total = torch.zeros((), dtype=dtype, device=student.hidden_ND.device)
    log_scale_N, teacher_log_scale_N, weight_N = (x.to(dtype) for x in rows_N)
    dlog_scale_N = torch.zeros_like(weight_N)
    gradients, buffer = Gradients(student, needs), Buffer(student.hidden_ND)
    row_bytes, fixed_bytes = _row_bytes(student, teacher, bool(measure.exact))
    workspace_bytes = measure.workspace_bytes - gradients.extra_bytes() - fixed_bytes
    for rows in chunks(len(weight_N), row_bytes, workspace_bytes):
        z_NV, softmax = whole_logits(student, buffer, rows)
        z_NW, teacher_softmax = whole_logits(teacher, buffer, rows)
        softmax = _scaled(softmax, log_scale_N[rows])
        teacher_softmax = _scaled(teacher_softmax, teacher_log_scale_N[rows])
        value_N, pull_NV = _compare(z_NV, softmax, z_NW, teacher_softmax, pairs, measure)
        total += (weight_N[rows] * value_N).sum()
        sum_N = pull_NV.sum(1)
        dlog_scale_N[rows] = weight_N[rows] * sum_N
        if not needs:
            continue
        slope_NV = None if cap is None else slope(z_NV, cap)
        # P (Σ P G) / c is p Σ P G, and 0 where c is too small for float32
        mean_N = sum_N / log_scale_N[rows].exp().clamp_min(torch.finfo(dtype).tiny)
        dz_NV = pull_NV.sub_(_probabilities(z_NV, softmax).mul_(mean_N[:, None]))
        dz_NV.mul_((weight_N[rows] * student.alpha)[:, None])
        if slope_NV is not None:
            dz_NV.mul_(slope_NV)
        gradients.add(dz_NV.to(student.low), student.rows, rows)
    found = (total.new_empty(0) if x is None else x for x in gradients.results())
    return [total, *found, dlog_scale_N]


def _row_bytes(student: Side, teacher: Side, exact: bool) -> tuple[int, int]:
    """Return what one row of a chunk takes: z, P, P G and copies of both; and what all take together."""
    both_bytes = student.row_bytes() + teacher.row_bytes()
    order_bytes, fixed_bytes = 3 * 8 * tile.BINS, 0
    if exact:
        order_bytes, fixed_bytes = sort_memory(student.hidden_ND.device, student.columns, teacher.columns)
    return 4 * both_bytes + student.row_bytes() + order_bytes, fixed_bytes


@torch.library.custom_op(
    "tokenkit::hybrid_distance",
    mutates_args=(),
    schema="(Tensor student, Tensor weight, Tensor? bias, Tensor log_scale, Tensor[] constants, "
    "float[] numbers, str words) -> Tensor[]",
)
def _operation(
    student: Tensor, weight: Tensor, bias: Tensor | None, log_scale: Tensor, *packed: Any
) -> list[Tensor]:
    call = unpack(*packed)
    measure = Measure(**call["measure"])
    own = side_of("student_ND", student, head_of(call["student_head"], weight, bias), measure.temperature)
    other = side_of(
        "teacher_NE", call["teacher_NE"], head_of(call["teacher_head"]), measure.teacher_temperature
    )
    pairs = Pairs(**call["pairs"]) if "pairs" in call else None
    with torch.autocast(student.device.type, enabled=False):  # it would round float32 operands
        return _run((own, other), _Rows(log_scale, **call["rows"]), pairs, call["needs"], measure)


@_operation.register_fake
def _(student: Tensor, weight: Tensor, bias: Tensor | None, log_scale: Tensor, *packed: Any) -> list[Tensor]:
    return formed_shapes((student, weight, bias, log_scale), unpack(*packed)["needs"] + "s", "xwbs")


register_formed(_operation, "hybrid_distance", 4)


def hybrid_distance(
    student: tuple[Tensor, Head, Tensor],
    teacher: tuple[Tensor, Head, Tensor],
    row_weight_N: Tensor,
    pairs: Pairs | None = None,
    measure: Measure = Measure(),  # noqa: B008  # a tuple: it cannot change
) -> Tensor:
    """Return Σ row_weight · value; differentiable in the student's states, log c, head weight and bias.

    Args:
        student: hidden states [N, D], head of their dtype and device, and log c [N] of the sums' dtype.
        teacher: the same of the teacher, row by row what the student's are compared with; no gradient.
        row_weight_N: constant weight of each row.
        pairs: of `split_columns`; None: every id is ranked.
        measure: how rows are compared.

    Returns:
        float32 (float64 for float64); log-probabilities in nats.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit together, a divided head, a teacher's
            head that requires a gradient, or (on a CPU) logits that are not finite.

    Precision: logits, probabilities and sums are float32. With `exact=False` as in `sorted_distance`. Bitwise
    repeatable.
    """
    student_ND, head, log_scale_N = student
    teacher_NE, teacher_head, teacher_log_scale_N = teacher
    rows_N = _Rows(log_scale_N, teacher_log_scale_N, row_weight_N)
    _check((student_ND, head), (teacher_NE, teacher_head), rows_N, measure)
    measure = measure._replace(exact=sorts(measure.exact, (head, teacher_head), False))
    packed = pack(
        needs=wanted(student_ND, head.weight_VD, head.bias_V),
        measure=measure._asdict(),
        rows={"teacher_log_scale_N": teacher_log_scale_N, "weight_N": row_weight_N},
        teacher_NE=teacher_NE,
        student_head=head_fields(head, tensors=False),
        teacher_head=head_fields(teacher_head),
        pairs=None if pairs is None else pairs._asdict(),
    )
    return _operation(student_ND, head.weight_VD, head.bias_V, log_scale_N, *packed)[0]


def _check(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], rows_N: _Rows, how: Measure) -> None:
    for name, (_, head) in (("student", student), ("teacher", teacher)):
        if head.shard is not None:
            raise ValueError(f"the {name}'s head is divided over processes: hybrid_distance needs it whole")
    check_sides(*student, *teacher, {"row_weight_N": rows_N.weight_N})
    refuse_forward_mode(rows_N.log_scale_N)
    for name, scale_N in (("student", rows_N.log_scale_N), ("teacher", rows_N.teacher_log_scale_N)):
        if scale_N.shape != student[0].shape[:1] or scale_N.device != student[0].device:
            raise ValueError(
                f"the {name}'s log scale must hold one number per row ({len(student[0])}), on "
                f"{student[0].device}: got shape {tuple(scale_N.shape)} on {scale_N.device}"
            )
    for name in ("temperature", "teacher_temperature"):
        if not 0 < getattr(how, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite: got {getattr(how, name)}")
    if not 0 <= how.beta <= 1:
        raise ValueError(f"beta must be in [0, 1]: got {how.beta}")
