"""How much of an adaptive divergence is kl: the gap |q − p| over the likely outcomes, as a part of all.

    tail = the least likely outcomes (by q) whose mass is below alpha, as many as there can be
    head = the others
    w    = Σ_head |q − p| / Σ |q − p|                                    no gradient flows through it

No sort: the least likely outcome of the head has the largest logit τ with Σ_{z < τ} q < alpha, which
bisection over the numbers that a float can be finds in 33 passes over the row, exactly. Of outcomes as likely
as τ the first belong to the head. Processes that share a vocabulary add up masses, a pass at a time.

Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for LLMs",
arXiv:2404.02657.
Dimensions: N tokens, V columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton

BLOCK_V = 2048
WARPS = 8

Reduce = Callable[[Tensor], Tensor]
"""Add up over the processes that share the vocabulary."""


class Pair(NamedTuple):
    """Logits of both models, up to a factor, and what makes probabilities of them."""

    z_NV: Tensor
    other_NV: Tensor
    alpha: float
    other_alpha: float
    top_N: Tensor
    """The maximum, from which lse_N is measured."""
    other_top_N: Tensor
    lse_N: Tensor
    other_lse_N: Tensor


class Below(NamedTuple):
    """Sums over the outcomes whose teacher logit is below τ, equal to it, or any."""

    mass_N: Tensor
    """Σ q below."""
    ties_N: Tensor
    """How many are equal."""
    tied_gap_N: Tensor
    """Σ |q − p| over the first `first_N` of them."""
    gap_N: Tensor
    """Σ |q − p| above."""
    whole_N: Tensor
    """Σ |q − p|."""


@triton.jit
def _below_kernel(
    z_ptr, other_ptr, lse_ptr, other_lse_ptr, tau_ptr, first_ptr, sums_ptr,
    stride, other_stride, N, V,
    alpha, other_alpha,
    WITH_GAPS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row: the five sums of `Below`, the gaps only where asked for."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    top = tl.load(lse_ptr + 2 * n)
    lse = tl.load(lse_ptr + 2 * n + 1)
    other_top = tl.load(other_lse_ptr + 2 * n)
    other_lse = tl.load(other_lse_ptr + 2 * n + 1)
    tau = tl.load(tau_ptr + n)
    first = tl.load(first_ptr + n)
    mass = 0.0
    ties = 0.0
    tied_gap = 0.0
    gap_above = 0.0
    whole = 0.0
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask = offs_v < V
        other = tl.load(other_ptr + n * other_stride + offs_v, mask=mask, other=0.0) * other_alpha
        q = tl.where(mask, tl.exp(other - other_top - other_lse), 0.0)
        mass += tl.sum(tl.where(other < tau, q, 0.0), axis=0)
        is_tie = mask & (other == tau)
        if WITH_GAPS:
            z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0) * alpha
            gap = tl.where(mask, tl.abs(q - tl.exp(z - top - lse)), 0.0)
            rank = ties + tl.cumsum(is_tie.to(tl.float32), axis=0)
            tied_gap += tl.sum(tl.where(is_tie & (rank <= first), gap, 0.0), axis=0)
            gap_above += tl.sum(tl.where(other > tau, gap, 0.0), axis=0)
            whole += tl.sum(gap, axis=0)
        ties += tl.sum(is_tie.to(tl.float32), axis=0)
    tl.store(sums_ptr + n, mass)
    tl.store(sums_ptr + N + n, ties)
    tl.store(sums_ptr + 2 * N + n, tied_gap)
    tl.store(sums_ptr + 3 * N + n, gap_above)
    tl.store(sums_ptr + 4 * N + n, whole)


def _below(pair: Pair, tau_N: Tensor, first_N: Tensor, *, with_gaps: bool) -> Tensor:
    """Return [5, N], the fields of `Below`, over this process's columns."""
    N, V = pair.z_NV.shape
    sums_5N = tau_N.new_zeros((5, N))
    if not (N and V):
        return sums_5N
    if runs_triton(pair.z_NV):
        with on_device(pair.z_NV):
            _below_kernel[(N,)](
                pair.z_NV, pair.other_NV, torch.stack([pair.top_N, pair.lse_N], 1),
                torch.stack([pair.other_top_N, pair.other_lse_N], 1), tau_N, first_N, sums_5N,
                pair.z_NV.stride(0), pair.other_NV.stride(0), N, V, pair.alpha, pair.other_alpha,
                WITH_GAPS=with_gaps, BLOCK_V=BLOCK_V, num_warps=WARPS,
            )  # fmt: skip
        return sums_5N
    for n in range(N):
        other_V, tau = pair.other_NV[n], tau_N[n]
        q_V = (other_V - pair.other_top_N[n]).sub_(pair.other_lse_N[n]).exp_()
        sums_5N[0, n] = (q_V * (other_V < tau)).sum()
        is_tie_V = other_V == tau
        sums_5N[1, n] = is_tie_V.sum()
        if with_gaps:
            gap_V = (q_V - (pair.z_NV[n] - pair.top_N[n]).sub_(pair.lse_N[n]).exp_()).abs_()
            sums_5N[2, n] = gap_V[is_tie_V & (is_tie_V.cumsum(0) <= first_N[n])].sum()
            sums_5N[3, n] = (gap_V * (other_V > tau)).sum()
            sums_5N[4, n] = gap_V.sum()
    return sums_5N


def _to_order(x: Tensor) -> Tensor:
    """Map floats to integers in the same order."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    return (bits ^ ((bits >> (8 * x.itemsize - 1)) & torch.iinfo(bits.dtype).max)).to(torch.int64)


def _from_order(order: Tensor, dtype: torch.dtype) -> Tensor:
    bits = order.to(torch.int32 if dtype == torch.float32 else torch.int64)
    return (bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(bits.dtype).max)).view(dtype)


def adaptive_weight(
    pair: Pair, rest: tuple[Tensor, Tensor] | None, alpha: float, reduce: Reduce, before: Reduce
) -> Tensor:
    """Return w of each row; 0.5 where the two models agree entirely.

    Args:
        pair: the columns that face each other, of this process.
        rest: log p and log q of one outcome more, the last, known to every process.
        alpha: mass in [0, 1] that the tail stays below.
        reduce: adds up over processes.
        before: the sum over the processes whose columns come first.
    """
    lse_N, dtype = pair.other_top_N + pair.other_lse_N, pair.lse_N.dtype
    none_N = torch.zeros_like(lse_N)

    def sums(tau_N: Tensor, first_N: Tensor, *, with_gaps: bool) -> Below:
        below = Below(*reduce(_below(pair, tau_N, first_N, with_gaps=with_gaps)))
        if rest is None:
            return below
        q_N, z_N = rest[1].exp(), rest[1] + lse_N
        gap_N = (q_N - rest[0].exp()).abs()
        return below._replace(
            mass_N=below.mass_N + q_N * (z_N < tau_N),
            ties_N=below.ties_N + (z_N == tau_N),
            gap_N=below.gap_N + gap_N * (z_N > tau_N),
            whole_N=below.whole_N + gap_N,
        )

    low_N = _to_order(torch.full_like(lse_N, torch.finfo(dtype).min))
    high_N = _to_order(lse_N + lse_N.abs() * 1e-5 + 1e-5)  # no logit is above the log-sum-exp
    for _ in range(8 * lse_N.itemsize + 1):
        middle_N = (low_N & high_N) + ((low_N ^ high_N) >> 1)  # their sum might not fit
        is_tail_N = sums(_from_order(middle_N, dtype), none_N, with_gaps=False).mass_N < alpha
        low_N, high_N = torch.where(is_tail_N, middle_N, low_N), torch.where(is_tail_N, high_N, middle_N)
    tau_N = _from_order(low_N, dtype)
    edge = sums(tau_N, none_N, with_gaps=False)
    tailing_N = ((alpha - edge.mass_N) / (tau_N - lse_N).exp()).ceil() - 1
    tailing_N = torch.minimum(tailing_N.nan_to_num(0).clamp_min(0), edge.ties_N - 1)
    first_N = edge.ties_N - tailing_N
    found = sums(tau_N, first_N - before(_below(pair, tau_N, none_N, with_gaps=False)[1]), with_gaps=True)
    head_N = found.gap_N + found.tied_gap_N
    if rest is not None:
        is_last_N = (rest[1] + lse_N == tau_N) & (tailing_N == 0)
        head_N = head_N + (rest[1].exp() - rest[0].exp()).abs() * is_last_N
    is_equal_N = found.whole_N == 0
    return torch.where(is_equal_N, 0.5, head_N / found.whole_N.masked_fill(is_equal_N, 1))
