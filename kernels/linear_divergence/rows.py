"""The numbers of each row that a divergence and its gradient need, from both models' logits of that row.

    log-sum-exps   over the columns that face each other, and over the ids in no pair; both make a model's lse
    the rest       one outcome more, whose log-probability is that of all ids in no pair
    value          Σ over outcomes, κ (Σ p − Σ q) included where ids repeat
    centre         Σ e over outcomes; with repeating ids, plus κ Σ p

All of it is O(N) beside the logits. Processes that share a vocabulary add up these numbers, never logits. The
formulas are those of `terms.py`. Dimensions: N tokens, V columns, P those that face each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head.logits import row_sums
from tokenkit.kernels.head.sharded import reduce_max, reduce_sum
from tokenkit.kernels.head.side import Side
from tokenkit.kernels.kinds import MIRROR, MIXED
from tokenkit.kernels.linear_divergence import tile
from tokenkit.kernels.linear_divergence.adaptive_weight import Pair, adaptive_weight
from tokenkit.kernels.linear_divergence.settings import Problem
from tokenkit.kernels.linear_divergence.terms import gradients, kappa, terms
from tokenkit.structs import Head

INFINITE = 1e12  # nats; a value above it holds a·log(a/0): `LOWEST` times a probability


class Logits(NamedTuple):
    """A tile of both models' logits, each up to its factor."""

    student_NV: Tensor
    teacher_NV: Tensor
    alpha: float
    teacher_alpha: float


class RowState(NamedTuple):
    """What the gradient needs of each row, [N] each. `teacher_`: with the models in each other's place."""

    top_N: Tensor
    """The maximum. Log-sum-exps are measured from it: alone, they are rounded at the size of z."""
    teacher_top_N: Tensor
    lse_N: Tensor
    teacher_lse_N: Tensor
    centre_N: Tensor
    teacher_centre_N: Tensor
    weight_N: Tensor
    """w of akl; the form of the student's skl, and 1 less that of the teacher's."""
    rest_lse_N: Tensor
    teacher_rest_lse_N: Tensor
    rest_factor_N: Tensor
    """Of exp(z − rest_lse), at ids in no pair."""
    teacher_rest_factor_N: Tensor


class Seen(NamedTuple):
    """A divergence from the place of one model: `lse_N` and `centre_N` are that model's."""

    side: Side
    share_P: Tensor | None
    kind: str
    top_N: Tensor
    other_top_N: Tensor
    lse_N: Tensor
    other_lse_N: Tensor
    centre_N: Tensor
    weight_N: Tensor
    rest_lse_N: Tensor
    rest_factor_N: Tensor


def seen(problem: Problem, state: RowState, *, by_teacher: bool) -> Seen:
    """Return the divergence from the place of the student or of the teacher."""
    if not by_teacher:
        return Seen(
            problem.student, problem.shares[0], problem.kind, state.top_N, state.teacher_top_N,
            state.lse_N, state.teacher_lse_N, state.centre_N, state.weight_N,
            state.rest_lse_N, state.rest_factor_N,
        )  # fmt: skip
    kind = MIRROR.get(problem.kind, problem.kind)
    return Seen(
        problem.teacher, problem.shares[1], kind, state.teacher_top_N, state.top_N,
        state.teacher_lse_N, state.lse_N, state.teacher_centre_N, 1 - state.weight_N,
        state.teacher_rest_lse_N, state.teacher_rest_factor_N,
    )  # fmt: skip


def row_state(problem: Problem, logits: Logits, *, train_teacher: bool) -> tuple[Tensor, RowState]:
    """Return the divergence of each row, and what its gradient needs.

    Args:
        problem: the divergence.
        logits: every column of both models.
        train_teacher: whether the teacher's gradient is wanted.
    """
    pairs, head = problem.pairs, problem.student.head
    alphas = logits.alpha, logits.teacher_alpha
    lses = [
        _log_sums(z_NV, pairs, alpha, share_P, head)
        for z_NV, alpha, share_P in zip(logits[:2], alphas, problem.shares, strict=True)
    ]
    (top_N, lse_N, rest_lse_N), (teacher_top_N, teacher_lse_N, teacher_rest_lse_N) = lses
    rest = None
    if problem.has_rest:
        rest = (
            (rest_lse_N - lse_N).clamp_min(tile.LOWEST.value),
            (teacher_rest_lse_N - teacher_lse_N).clamp_min(tile.LOWEST.value),
        )
    z_NP, other_NP = (z_NV[:, :pairs] for z_NV in logits[:2])
    weight_N = torch.full_like(lse_N, problem.kind == "skl")  # the sums are in the form for near rows
    if problem.kind == "akl":
        pair = Pair(z_NP, other_NP, *alphas, top_N, teacher_top_N, lse_N, teacher_lse_N)
        weight_N = adaptive_weight(pair, rest, problem.tail_mass, *_reducers(head))
    mirror = MIRROR.get(problem.kind, problem.kind) if train_teacher else None
    measure = tile.Measure(problem.kind, problem.skew, *alphas, None)
    lse = torch.stack([top_N, lse_N], 1), torch.stack([teacher_top_N, teacher_lse_N], 1)
    found = tile.divergence_sums(z_NP, other_NP, lse, weight_N, measure, mirror)
    if head.shard is not None:
        found = tile.RowSums(*reduce_sum(torch.stack(found), head).unbind())
    state = RowState(
        top_N, teacher_top_N, lse_N, teacher_lse_N, found.centre_N, found.teacher_centre_N, weight_N,
        rest_lse_N, teacher_rest_lse_N, torch.zeros_like(lse_N), torch.zeros_like(lse_N),
    )  # fmt: skip
    return _with_rest(problem, state, found, rest)


def _with_rest(problem: Problem, state: RowState, found: tile.RowSums, rest: Any) -> tuple[Tensor, RowState]:
    """Add the outcome of all ids in no pair, correct for repeating ids, and find what those ids pull."""
    value_N, centres = found.value_N, [found.centre_N, found.teacher_centre_N]
    masses = [found.p_N, found.q_N]
    mirror = MIRROR.get(problem.kind, problem.kind)
    pulls: list[Any] = [0.0, 0.0]
    shared_N: Any = 0.0  # of the rest
    if rest is not None:
        d_N = rest[1] - rest[0]
        addend_N, pulls[0], shared_N = terms(
            rest[0], rest[1], d_N, problem.kind, problem.skew, state.weight_N
        )
        pulls[1], _ = gradients(rest[1], rest[0], -d_N, mirror, problem.skew, 1 - state.weight_N)
        value_N = value_N + addend_N
        centres = [centre_N + pull_N for centre_N, pull_N in zip(centres, pulls, strict=True)]
        masses = [mass_N + log_N.exp() for mass_N, log_N in zip(masses, rest, strict=True)]
    if any(share_P is not None for share_P in problem.shares):
        drift_N = masses[0] - masses[1]
        value_N = value_N + kappa(problem.kind, problem.skew, state.weight_N) * drift_N
    if problem.kind in MIXED:
        state = _with_form(problem, state, found.shared_N, shared_N, centres, pulls)
    kappas = (
        kappa(problem.kind, problem.skew, state.weight_N),
        kappa(mirror, problem.skew, 1 - state.weight_N),
    )
    factors = []
    for i, share_P in enumerate(problem.shares):
        if share_P is not None:
            centres[i] = centres[i] + kappas[i] * masses[i]
        whole_N, rest_N = ((state.lse_N, state.rest_lse_N), (state.teacher_lse_N, state.teacher_rest_lse_N))[
            i
        ]
        mass_N = (rest_N - whole_N).exp()  # of the ids in no pair, an outcome or not
        drift = kappas[i] * mass_N if share_P is not None and rest is not None else 0.0
        factors.append(pulls[i] + drift - mass_N * centres[i])
    value_N = torch.where(value_N > INFINITE, torch.inf, value_N)
    return value_N, state._replace(
        centre_N=centres[0],
        teacher_centre_N=centres[1],
        rest_factor_N=factors[0],
        teacher_rest_factor_N=factors[1],
    )


def _with_form(
    problem: Problem, state: RowState, shared_N: Tensor, rest_N: Tensor | float, centres: Any, pulls: Any
) -> RowState:
    """Choose skl's form of each row, and bring that model's `centres` and `pulls` into it."""
    i = MIXED.index(problem.kind)  # skl is the student's, or of srkl the teacher's
    whole_N, slope = shared_N + rest_N, problem.skew - 1
    near_N = whole_N >= 0.5
    centres[i] = torch.where(near_N, centres[i], slope * whole_N)
    pulls[i] = torch.where(near_N, pulls[i], slope * rest_N)
    form_N = near_N.to(whole_N.dtype)
    return state._replace(weight_N=1 - form_N if i else form_N)


def _log_sums(
    z_NV: Tensor, pairs: int, alpha: float, share_P: Tensor | None, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maximum of each row and, from it, the log-sum-exp of all columns and of those in no pair."""
    parts = [row_sums(z_NV[:, :pairs], alpha, share_P), row_sums(z_NV[:, pairs:], alpha)]
    max_2N, sum_2N = (torch.stack(x) for x in zip(*parts, strict=True))
    if head.shard is not None:
        top_2N = reduce_max(max_2N.clone(), head)
        shrink_2N = torch.exp(max_2N - top_2N).masked_fill(max_2N == -torch.inf, 0)
        max_2N, sum_2N = top_2N, reduce_sum(sum_2N * shrink_2N, head)
    top_N = max_2N.amax(0)
    below_2N = (max_2N - top_N).masked_fill(max_2N == -torch.inf, -torch.inf)
    lse_N = (sum_2N * below_2N.exp()).sum(0).log()
    return top_N, lse_N, below_2N[1] + sum_2N[1].log()


def _reducers(head: Head) -> tuple[Any, Any]:
    """Return the sum over the processes that share the head, and over those before this one."""
    shard = head.shard
    if shard is None:
        return (lambda x: x), torch.zeros_like

    def before(x_N: Tensor) -> Tensor:
        every_RN = x_N.new_zeros((shard.group.size(), *x_N.shape))
        every_RN[shard.group.rank()] = x_N
        return reduce_sum(every_RN, head)[: shard.group.rank()].sum(0)

    return (lambda x: reduce_sum(x, head)), before


def write_gradient(
    problem: Problem,
    view: Seen,
    upstream_N: Tensor,
    logits: Logits,
    columns: slice,
    dz_NV: Tensor,
) -> None:
    """Write dz at columns that face each other, of the model from whose place `view` is seen.

    Args:
        problem: the divergence.
        view: from whose place.
        upstream_N: gradient of each row's value.
        logits: both models' at these columns.
        columns: which of the P.
        dz_NV: where to write; may be that model's logits.
    """
    kappa_N = torch.zeros_like(upstream_N) + kappa(view.kind, problem.skew, view.weight_N)
    rows_N = tile.GradientRows(
        view.lse_N, view.other_lse_N, view.centre_N, view.weight_N, upstream_N * view.side.alpha, kappa_N,
        view.top_N, view.other_top_N,
    )  # fmt: skip
    share_P = None if view.share_P is None else view.share_P[columns]
    own_NV, other_NV, alpha, other_alpha = logits
    if view.side is problem.teacher:
        own_NV, other_NV, alpha, other_alpha = other_NV, own_NV, other_alpha, alpha
    measure = tile.Measure(view.kind, problem.skew, alpha, other_alpha, view.side.cap)
    tile.gradient(own_NV, other_NV, rows_N, measure, share_P, dz_NV)


def write_rest_gradient(view: Seen, upstream_N: Tensor, z_NV: Tensor, alpha: float, dz_NV: Tensor) -> None:
    """Write dz at ids in no pair, of the model from whose place `view` is seen; dz_NV may be z_NV."""
    factor_N = view.rest_factor_N * upstream_N * view.side.alpha
    lse_N = torch.where(view.rest_lse_N == -torch.inf, 0, view.rest_lse_N)
    lse_N2 = torch.stack([view.top_N, lse_N], 1)
    tile.rest_gradient(z_NV, lse_N2, factor_N, alpha, view.side.cap, dz_NV)
