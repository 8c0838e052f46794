"""Whether a target is the likeliest under a mean of probabilities, found without keeping them.

    Σ_k w_k p_k(v)  ≤  Σ_k w_k exp(M_k(b) − lse_k)        v in the block b of ids, M_k(b) its largest logit

A block whose bound is not above the target's own number holds nothing that is likelier. Of a row's other
blocks that of the largest bound is multiplied out, for that row alone: mostly something in it is likelier,
and the row is decided. What a few such looks leave open is decided by keeping the row.

One pass over tiles as wide as a core's cache holds, and one number for each 128 logits. It asks the CPU what
is open, so a GPU, where reading kept numbers costs little beside products, does not take it.

Dimensions: K heads, N tokens, R tokens that are open, V vocabulary, G blocks of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head import tiles
from tokenkit.kernels.head.side import Side
from tokenkit.kernels.head.tiles import Buffer
from tokenkit.kernels.linear_ensemble.passes import (
    chunks_of,
    finished,
    fresh_sums,
    kept_rows,
    plan_of,
    products_of,
    some_rows,
    tiles_of,
    weights_as,
)
from tokenkit.kernels.linear_logprob.plan import Masses, Sums, masses
from tokenkit.kernels.linear_logprob.tiled import fold

BLOCK = 128  # ids of one bound: tiles are as wide as a multiple of it
LOOKS = 4  # blocks of a row that are multiplied out, before it is kept
NEAR = 1e-5  # of its number: ids so near the target are compared in kept rows, where all come of one product


def find_top(
    sides: Sequence[Side], target_N: Tensor, weights: Sequence[float], workspace_bytes: int, *, asks_top: bool
) -> tuple[Tensor, Tensor | None]:
    """Return each head's log p of the targets [K, N], and whether none is likelier to the mean (if asked)."""
    row_bytes = 2 * len(sides) * -(-sides[0].columns // BLOCK) * sides[0].dtype.itemsize
    logps, tops = [sides[0].hidden_ND.new_empty((len(sides), 0), dtype=sides[0].dtype)], [target_N[:0].bool()]
    buffer = Buffer(sides[0].hidden_ND)
    for rows in chunks_of(sides[0], row_bytes, workspace_bytes):
        some, target_R = [some_rows(side, rows) for side in sides], target_N[rows]
        found = [_sums(side, target_R, buffer, asks_top=asks_top) for side in some]
        of_heads = [masses(sums, torch.ones_like(target_R, dtype=torch.bool), None) for sums, _ in found]
        for side, one in zip(sides, of_heads, strict=True):
            side.check_finite(one.lse_N, rows.start)
        logps.append(torch.stack([one.logp_N for one in of_heads]))
        if asks_top:
            weight_K = weights_as(weights, logps[0])
            seen = Seen(
                weight_K,
                torch.stack([one.lse_N for one in of_heads]),
                _mean([sums.z_target_N for sums, _ in found], of_heads, weight_K),
                _mean([most_RG for _, most_RG in found], of_heads, weight_K),
            )
            tops.append(_decide(some, target_R, seen, workspace_bytes))
    return torch.cat(logps, -1), torch.cat(tops) if asks_top else None


class Seen(NamedTuple):
    """What one pass leaves behind."""

    weight_K: Tensor
    lse_KR: Tensor
    at_target_R: Tensor
    """Σ w p of the target."""
    bound_RG: Tensor
    """What no id of a block is above."""


def _mean(logits: Sequence[Tensor], of_heads: Sequence[Masses], weight_K: Tensor) -> Tensor:
    """Return Σ w exp(z − lse), one order of operations for all: a bound that is met is equal."""
    total: Tensor | None = None
    for z, one, weight in zip(logits, of_heads, weight_K, strict=True):
        p = (z - (one.lse_N if z.ndim == 1 else one.lse_N[:, None])).exp_().mul_(weight)
        total = p if total is None else total.add_(p)
    assert total is not None
    return total


def _sums(side: Side, target_N: Tensor, buffer: Buffer, *, asks_top: bool) -> tuple[Sums, Tensor]:
    """Return a head's sums, and the largest logit of each block [N, G]."""
    N = len(target_N)
    sums, plan = fresh_sums(side), plan_of(side, target_N, "statistics")
    most_NG = side.hidden_ND.new_empty((N, -(-side.columns // BLOCK)), dtype=side.dtype)
    for tile in tiles_of(side, N):
        z_NV = buffer.get("z", N, tile.end - tile.start, side.dtype)
        finished(side, tile, z_NV)
        if asks_top:
            _block_maxima(z_NV, most_NG[:, tile.start // BLOCK :])
        fold(z_NV, tile, plan, sums, None)
    return sums, most_NG


def _block_maxima(z_NV: Tensor, most_NG: Tensor) -> None:
    """Write the largest of each `BLOCK` columns, of which the last may have fewer."""
    whole = z_NV.shape[1] // BLOCK
    if whole:
        most_NG[:, :whole] = z_NV[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(-1)
    if z_NV.shape[1] % BLOCK:
        most_NG[:, whole] = z_NV[:, whole * BLOCK :].amax(1)


def _decide(sides: Sequence[Side], target_N: Tensor, seen: Seen, workspace_bytes: int) -> Tensor:
    """Say of each row whether no other id is likelier."""
    is_top_N, is_near_N = (torch.full_like(target_N, value, dtype=torch.bool) for value in (True, False))
    row_R, bound_RG = torch.arange(len(target_N), device=target_N.device), seen.bound_RG
    for look in range(LOOKS + 1):
        is_open_R = (bound_RG > seen.at_target_R[row_R, None]).any(1)
        row_R, bound_RG = row_R[is_open_R], bound_RG[is_open_R]
        if look == LOOKS or not len(row_R):
            break
        block_R = bound_RG.argmax(1)
        most_R = _largest_in(sides, target_N, seen, (row_R, block_R), workspace_bytes)
        at_R = seen.at_target_R[row_R]
        is_near_R = (most_R - at_R).abs() <= NEAR * at_R
        is_near_N[row_R] |= is_near_R
        is_top_N[row_R] = most_R <= at_R
        bound_RG.scatter_(1, block_R[:, None], 0)
        goes_on_R = (most_R <= at_R) & ~is_near_R
        row_R, bound_RG = row_R[goes_on_R], bound_RG[goes_on_R]
    row_R = torch.cat([row_R, is_near_N.nonzero()[:, 0]])
    if len(row_R):
        some = [some_rows(side, row_R) for side in sides]
        kept = kept_rows(some, target_N[row_R], seen.weight_K.tolist(), workspace_bytes)
        is_top_N[row_R] = kept.at_target_N >= kept.most_N
    return is_top_N


def _largest_in(
    sides: Sequence[Side], target_N: Tensor, seen: Seen, blocks: tuple[Tensor, Tensor], workspace_bytes: int
) -> Tensor:
    """Return the largest Σ w p in one block of each row, the target left out."""
    (row_R, block_R), V = blocks, sides[0].columns
    row_bytes = BLOCK * max(side.hidden_ND.shape[1] for side in sides) * sides[0].dtype.itemsize
    found = []
    for part in tiles.chunks(len(row_R), row_bytes, workspace_bytes):
        row_P = row_R[part]
        ids_PV = block_R[part, None] * BLOCK + torch.arange(BLOCK, device=row_R.device)
        is_other_PV = (ids_PV < V) & (ids_PV != target_N[row_P, None])
        ids_PV.clamp_(max=V - 1)
        total_PV = torch.zeros(ids_PV.shape, dtype=sides[0].dtype, device=row_R.device)
        for side, lse_N, weight in zip(sides, seen.lse_KR, seen.weight_K, strict=True):
            total_PV += (products_of(side, row_P, ids_PV) - lse_N[row_P, None]).exp_().mul_(weight)
        found.append(torch.where(is_other_PV, total_PV, 0).amax(1))
    return torch.cat(found)
