"""Log-probability of each target under several heads asked as one, and whether any other token is likelier.

    p_k = softmax(z_k)  over the ids of the first head
    mean_prob      p(v) = Σ_k w_k p_k(v)
    mean_logits    p(v) ∝ exp(Σ_k w_k z_k(v)) ∝ Π_k p_k(v)^w_k
    max            p(v) ∝ max_k p_k(v)

Each head is multiplied once; logits are float32, of a tile or of a few rows:

    log p of mean_prob            each head's own log p of the target says it
    mean_logits                   one loop over tiles: the mean of the tiles is a tile of one model more
    max, and the likeliest of     Σ_v max_k p_k(v) and max_v Σ_k w_k p_k(v) need every p_k, that is every
    mean_prob                     log-sum-exp, first: exp(z − m) of a few rows is kept, in `workspace_bytes`,
                                  and read again; where torch's lines run, the likeliest of mean_prob is
                                  found by bounds, and only rows that these leave open are kept

Not differentiable: it is there to measure. Dimensions: K heads, N tokens, V vocabulary of the first head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels import deferred
from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.head.side import Side, check_hidden, check_side, side_of
from tokenkit.kernels.head.tiles import default_workspace
from tokenkit.kernels.launch import runs_triton
from tokenkit.kernels.linear_ensemble.bounds import find_top
from tokenkit.kernels.linear_ensemble.passes import Part, blended, kept_rows, weights_as
from tokenkit.kernels.linear_logprob.plan import masses

Combination = Literal["mean_prob", "mean_logits", "max"]


class EnsembleLogprob(NamedTuple):
    """What `linear_ensemble` returns: nats, float32 (float64 for float64 inputs)."""

    logp_N: Tensor
    """Of the ensemble."""
    members_KN: Tensor | None
    """Of each head alone; None: not asked."""
    is_top1_N: Tensor | None
    """bool, no other id is more likely to the ensemble; None: not asked."""


@torch.no_grad()
def linear_ensemble(
    parts: Sequence[Part],
    target_N: Tensor,
    combination: Combination,
    *,
    asks_top: bool = True,
    asks_members: bool = True,
    workspace_bytes: int | None = None,
) -> EnsembleLogprob:
    """Return log p of given tokens to several heads asked as one.

    Args:
        parts: hidden states, head and weight of each, and its ids for those of the first where they differ.
        target_N: int64 ids of the first head.
        combination: of the heads' distributions; `max` reads no weights.
        asks_top: say whether a target is the likeliest.
        asks_members: say too what each head alone says.
        workspace_bytes: for exp(z − m) of a few rows under every head, one row at least. None: 256 MiB on a
            CPU, a sixteenth of a GPU's memory.

    Raises:
        ValueError: shapes, dtypes or (on a CPU) ids that do not fit together; weights that are not above 0
            with a sum of 1; a head divided over processes.
    """
    sides = _sides(parts, target_N, combination)
    weights = [part.weight for part in parts]
    if workspace_bytes is None:
        workspace_bytes = default_workspace(target_N.device)
    with torch.autocast(target_N.device.type, enabled=False):  # it would round float32 operands
        if combination == "mean_logits":
            found = _of_mean_logits(sides, target_N, weights, asks_members=asks_members)
        elif combination == "max":
            found = _of_max(sides, target_N, workspace_bytes)
        else:
            found = _of_mean_prob(sides, target_N, weights, workspace_bytes, asks_top=asks_top)
    return EnsembleLogprob(
        found.logp_N,
        found.members_KN if asks_members else None,
        found.is_top1_N if asks_top else None,
    )


def _of_mean_logits(
    sides: list[Side], target_N: Tensor, weights: list[float], *, asks_members: bool
) -> EnsembleLogprob:
    for side in sides:
        check_hidden(side.name, side.hidden_ND)  # the sums are of all heads together
    mean, members = blended(sides, target_N, weights, asks_members=asks_members)
    scored_N = torch.ones_like(target_N, dtype=torch.bool)
    found = masses(mean, scored_N, None)
    sides[0].check_finite(found.lse_N)
    logp = [masses(sums, scored_N, None).logp_N for sums in members]
    is_top_N = mean.z_target_N >= mean.max_PN[0]
    return EnsembleLogprob(found.logp_N, torch.stack(logp) if logp else None, is_top_N)


def _of_max(sides: list[Side], target_N: Tensor, workspace_bytes: int) -> EnsembleLogprob:
    """The likeliest needs no second look: it is the likeliest of all that is the likeliest to a head."""
    found = kept_rows(sides, target_N, None, workspace_bytes)
    gap_KN = found.z_target_KN - found.lse_KN
    is_top_N = gap_KN.amax(0) >= (found.max_KN - found.lse_KN).amax(0)
    return EnsembleLogprob(found.logp_KN.amax(0) - found.sum_N.log(), found.logp_KN, is_top_N)


def _of_mean_prob(
    sides: list[Side], target_N: Tensor, weights: list[float], workspace_bytes: int, *, asks_top: bool
) -> EnsembleLogprob:
    found: tuple[Tensor, Tensor | None]
    if asks_top and runs_triton(sides[0].hidden_ND):
        kept = kept_rows(sides, target_N, weights, workspace_bytes)
        found = kept.logp_KN, kept.at_target_N >= kept.most_N
    else:
        found = find_top(sides, target_N, weights, workspace_bytes, asks_top=asks_top)
    return EnsembleLogprob(_mean(found[0], weights), *found)


def _mean(logp_KN: Tensor, weights: list[float]) -> Tensor:
    """Return log Σ w p; where all are sure, 1 − p is a sum of theirs and no difference."""
    weight_K1 = weights_as(weights, logp_KN)[:, None]
    top_N = logp_KN.amax(0)
    gap_KN = logp_KN - top_N
    less_N = (weight_K1 * gap_KN.expm1()).sum(0)
    share_N = (weight_K1 * gap_KN.exp()).sum(0)
    return top_N + torch.where(less_N > -0.5, less_N.log1p(), share_N.log())


def _sides(parts: Sequence[Part], target_N: Tensor, combination: str) -> list[Side]:
    """Return what is multiplied, the columns of every head those of the first."""
    if not parts:
        raise ValueError("an ensemble needs at least one head: parts is empty")
    weights = [part.weight for part in parts]
    if combination != "max" and (min(weights) <= 0 or not math.isclose(sum(weights), 1, rel_tol=1e-6)):
        raise ValueError(f"weights must be above 0 and of sum 1: got {weights}")
    V = vocab_size(parts[0].head) if parts[0].ids_V is None else len(parts[0].ids_V)
    sides = []
    for k, (hidden_ND, head, _, ids_V) in enumerate(parts):
        name = f"parts[{k}].hidden_ND"
        check_side(name, hidden_ND, head, f"parts[{k}].head")
        if head.shard is not None:
            raise ValueError(f"parts[{k}].head is divided over processes: gather it first")
        if len(hidden_ND) != len(target_N) or hidden_ND.device != target_N.device:
            raise ValueError(
                f"{name} must hold one row for each of {len(target_N)} targets, on {target_N.device}: got "
                f"{tuple(hidden_ND.shape)} on {hidden_ND.device}"
            )
        if (len(ids_V) if ids_V is not None else vocab_size(head)) < V:
            raise ValueError(f"parts[{k}] must have an id for each of the {V} of the first head")
        rows = slice(0, V) if ids_V is None else ids_V[:V]
        sides.append(side_of(name, hidden_ND, head, rows=rows))
    words = f"target_N must hold ids in [0, {V}) of the first head"
    in_range_N = (target_N >= 0) & (target_N < V)
    deferred.require(in_range_N, words, ValueError, lambda row: ValueError(f"{words}: got {target_N[row]}"))
    return sides
