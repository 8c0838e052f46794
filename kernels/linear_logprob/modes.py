"""Forward and backward of `linear_logprob` in its three modes, whichever executor walks the vocabulary.

The formulas are those of `operation.py`. Dimensions: N tokens, V vocabulary (here: the rows of this
process), D hidden size, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenkit.kernels.head.sharded import check_cover, reduce_max, reduce_sum
from tokenkit.kernels.head.subset import REST, SUBSET
from tokenkit.kernels.head.sums import Gradients
from tokenkit.kernels.linear_logprob import fused, tiled
from tokenkit.kernels.linear_logprob.plan import Plan, Sums, kept_dtype, masses
from tokenkit.kernels.linear_logprob.tile import rescale


def forward(plan: Plan) -> tuple[Sums, Tensor, Tensor, Tensor]:
    """Return the statistics of every row, the tensor that holds them, and what the mode keeps."""
    hidden_ND, head = plan.side.hidden_ND, plan.side.head
    N, D = hidden_ND.shape
    sums_5N = hidden_ND.new_zeros((5, N), dtype=plan.dtype)
    sums = Sums(sums_5N[:2].fill_(-torch.inf), sums_5N[2:4], sums_5N[4])
    kept, shift = (hidden_ND.new_empty(0, dtype=plan.dtype) for _ in range(2))
    if plan.mode == "frozen":
        kept = hidden_ND.new_zeros((1 if plan.subset is None else 2, N, D), dtype=plan.dtype)
    elif plan.mode == "cached":
        kept = hidden_ND.new_empty(N * plan.rows, dtype=kept_dtype(hidden_ND))
        shift = hidden_ND.new_empty(len(plan.tiles), 2, N, dtype=plan.dtype)
    if N and plan.rows and fused.takes(plan):
        fused.forward(plan, sums, kept)
    elif N and plan.rows:
        tiled.forward(plan, sums, kept, shift)
    if head.shard is not None:
        check_cover(head, hidden_ND.device)
        before_PN = sums.max_PN.clone()
        reduce_max(sums.max_PN, head)
        shrink_PN = torch.where(before_PN == -torch.inf, 0, torch.exp(before_PN - sums.max_PN))
        sums.sum_PN.mul_(shrink_PN)
        reduce_sum(sums_5N[2:], head)
        if plan.mode == "frozen":
            for part in range(len(kept)):
                rescale(kept[part], shrink_PN[part])
    return sums, sums_5N, kept, shift


def backward(
    upstream: Sequence[Tensor | None], saved: tuple[Sums, Tensor, Tensor], plan: Plan, needs: str
) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias, None where `needs` says so."""
    side = plan.side
    sums, kept, shift = saved
    rows = _row_gradients(upstream, sums, plan)
    if plan.mode == "frozen":
        gradient_ND = _frozen_gradient(rows, side.head.weight_VD, kept, plan)
        return [reduce_sum(gradient_ND, side.head).to(side.hidden_ND.dtype), None, None]
    gradients = Gradients(side, needs, adds=False)
    if len(side.hidden_ND) and plan.rows and fused.takes(plan, backward=True):
        fused.backward(rows, plan, gradients)
    elif plan.rows:
        tiled.backward(rows, (kept, shift), plan, gradients)
    tensors = side.hidden_ND, side.head.weight_VD, side.head.bias_V
    found = zip(gradients.results(), tensors, strict=True)
    return [None if x is None or like is None else x.to(like.dtype) for x, like in found]


def _row_gradients(
    upstream: Sequence[Tensor | None], sums: Sums, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, α included: the maximum of each part, the factor of exp(z − maximum) in it, dz at the target.

    The maximum and not lse, because z − maximum is exact where it counts, and lse is a rounded number.
    """
    b_N, scored_N = upstream[1], plan.scored_N
    a_N, l_N = (torch.zeros_like(sums.z_target_N) if x is None else x for x in (upstream[0], upstream[2]))
    a_N = torch.where(scored_N, a_N, 0)
    found = masses(sums, scored_N, plan.in_subset_N)
    mass_PN, p_N = found.mass_PN, found.p_N
    dz_target_N = a_N * found.others_N + l_N * p_N
    rest_N = l_N - a_N
    factor_PN = torch.stack([rest_N * mass_PN[REST], rest_N * mass_PN[SUBSET]])
    if b_N is not None and plan.in_subset_N is not None:
        inside_N = plan.in_subset_N
        factor_PN[REST] -= b_N * mass_PN[REST]
        factor_PN[SUBSET] += b_N * mass_PN[REST]
        at_target_N = torch.where(inside_N, sums.z_target_N - sums.max_PN[SUBSET], -torch.inf)
        share_N = torch.exp(at_target_N) / torch.where(inside_N, found.sum_PN[SUBSET], 1)
        dz_target_N = dz_target_N + b_N * torch.where(inside_N, mass_PN[REST] * share_N, -p_N)
    if plan.side.cap is not None:
        dz_target_N = dz_target_N * (1 - (sums.z_target_N / plan.side.cap).square())
    factor_PN = torch.where(found.sum_PN > 0, factor_PN * plan.side.alpha / found.sum_PN, 0)
    return sums.max_PN, factor_PN, torch.where(scored_N, dz_target_N * plan.side.alpha, 0)


def _frozen_gradient(
    rows: tuple[Tensor, Tensor, Tensor], weight_VD: Tensor, mean_PND: Tensor, plan: Plan
) -> Tensor:
    """dX = dz[target] W[target] + Σ_C factor_C · Σ_{v in C, not the target} exp(z − m) W[v]."""
    _, factor_PN, dz_target_N = rows
    if not plan.rows:
        return torch.zeros_like(mean_PND[0])
    target_ND = weight_VD[plan.row_N.clamp_min(0)].to(plan.dtype)
    dhidden_ND = torch.where(plan.row_N >= 0, dz_target_N, 0)[:, None] * target_ND
    for part in range(len(mean_PND)):
        dhidden_ND.addcmul_(factor_PN[part, :, None], mean_PND[part])
    return dhidden_ND
