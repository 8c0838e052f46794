"""Loops over tiles of the vocabulary, of several heads side by side.

What one head's tile adds to its sums is `fold` of `linear_logprob`, so that a member's figures here are its
figures there. Dimensions: K heads, N tokens, R tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head import logits, tiles
from tokenkit.kernels.head.products import operand, part_of
from tokenkit.kernels.head.side import Side
from tokenkit.kernels.head.tiles import Buffer
from tokenkit.kernels.launch import runs_triton, upload
from tokenkit.kernels.linear_ensemble.tile import Totals, combine
from tokenkit.kernels.linear_logprob.plan import COLUMNS, REST, Mode, Plan, Sums, Tile, masses, widths
from tokenkit.kernels.linear_logprob.tiled import fold
from tokenkit.structs import Head

CPU_TILE_BYTES = 2**20  # a tile is passed over six times: it stays in a core's own cache
CPU_ROWS = 512  # most that are taken together: tiles then have 512 columns, each with a few small operations


class Part(NamedTuple):
    """One head of several."""

    hidden_ND: Tensor
    """Of the tokens before the targets; bfloat16, float16, float32 or float64."""
    head: Head
    """Of their dtype and device."""
    weight: float = 1.0
    """In a mean: above 0, of sum 1 over the heads."""
    ids_V: Tensor | None = None
    """int64, this head's id for each of the first head's, which may repeat. None: they are the same."""


class Kept(NamedTuple):
    """What two passes over a few rows at a time find."""

    logp_KN: Tensor
    """Of each head, of the target."""
    lse_KN: Tensor
    max_KN: Tensor
    """Of each head's logits."""
    z_target_KN: Tensor
    at_target_N: Tensor
    """Σ w p of the target; 0 for a maximum."""
    most_N: Tensor
    """The largest Σ w p; 0 for a maximum."""
    sum_N: Tensor
    """Σ max p over all ids; 0 for a mean."""


def columns_of(side: Side, rows: int) -> int:
    """Return how many columns a tile has."""
    if runs_triton(side.hidden_ND):
        return min(widths(side, "cached", tiles.TILE_BYTES)[0], COLUMNS[1])
    return tiles.width(rows, side.dtype.itemsize, CPU_TILE_BYTES, COLUMNS)


def tiles_of(side: Side, rows: int) -> list[Tile]:
    """Cut the vocabulary for so many tokens."""
    V, step = side.columns, columns_of(side, rows)
    return [
        Tile(start, min(start + step, V), REST, part_of(side.rows, start, min(start + step, V)))
        for start in range(0, V, step)
    ]


def some_rows(side: Side, rows: slice | Tensor) -> Side:
    """Return the side of some of its tokens."""
    return side._replace(hidden_ND=side.hidden_ND[rows])


def finished(side: Side, tile: Tile, z_NV: Tensor) -> float:
    """Write a tile's logits to z_NV; return the factor that is left to their reader."""
    side.products(z_NV, operand(side.head.weight_VD[tile.rows], side.dtype))
    bias_V = None if side.bias_V is None else side.bias_V[tile.start : tile.end]
    return logits.finish(z_NV, bias_V, side.alpha, side.cap)


def weights_as(weights: Sequence[float], like: Tensor) -> Tensor:
    """Return weights in the dtype and on the device of a tensor; the host does not wait."""
    return upload(torch.tensor(weights, dtype=like.dtype), like.device)


def fresh_sums(side: Side) -> Sums:
    """Return the sums of no columns."""
    sums_5N = side.hidden_ND.new_zeros((5, len(side.hidden_ND)), dtype=side.dtype)
    return Sums(sums_5N[:2].fill_(-torch.inf), sums_5N[2:4], sums_5N[4])


def plan_of(side: Side, target_N: Tensor, mode: Mode) -> Plan:
    """Return what `fold` reads of a head whose logits are finished, up to the factor that `finish` leaves."""
    is_left = runs_triton(side.hidden_ND) and side.bias_V is None and side.cap is None
    factor = side.alpha if is_left else 1.0
    return Plan(
        mode=mode,
        side=side._replace(bias_V=None, alpha=factor, cap=None),
        tiles=[],
        stretches=[],
        scored_N=torch.ones_like(target_N, dtype=torch.bool),
        row_N=target_N,
        place_N=target_N,
        subset=None,
        inside_V=None,
        in_subset_N=None,
        workspace_bytes=0,
        has_triton=runs_triton(side.hidden_ND),
    )


def chunks_of(side: Side, row_bytes: int, workspace_bytes: int) -> list[slice]:
    """Cut the tokens by what each takes, on a CPU also so that tiles need not be narrow."""
    N, is_rounded = len(side.hidden_ND), runs_triton(side.hidden_ND)
    if not is_rounded:
        workspace_bytes = min(workspace_bytes, CPU_ROWS * row_bytes)
    return tiles.chunks(N, row_bytes, workspace_bytes, rounded=is_rounded)


def blended(
    sides: Sequence[Side], target_N: Tensor, weights: Sequence[float], *, asks_members: bool
) -> tuple[Sums, list[Sums]]:
    """Return the sums of the mean of all logits, and those of each head (none, unless asked)."""
    first = sides[0]
    buffer = Buffer(first.hidden_ND)
    mean, members = fresh_sums(first), [fresh_sums(side) for side in sides] if asks_members else []
    for rows in chunks_of(first, 1, len(target_N)):
        some = [some_rows(side, rows) for side in sides]
        sums = [Sums(*(x[..., rows] for x in one)) for one in (mean, *members)]
        _blend_chunk(some, target_N[rows], weights, sums, buffer)
    return mean, members


def _blend_chunk(
    sides: Sequence[Side], target_R: Tensor, weights: Sequence[float], sums: Sequence[Sums], buffer: Buffer
) -> None:
    """Fold every tile into the sums of the mean and, where there are more, of each head."""
    R, dtype, members = len(target_R), sides[0].dtype, sums[1:]
    plans = [plan_of(side, target_R, "statistics") for side in (sides[0], *sides)]
    for places in zip(*(tiles_of(side, R) for side in sides), strict=True):
        V = places[0].end - places[0].start
        total_RV, z_RV = (buffer.get(name, R, V, dtype) for name in ("total", "z"))
        for k, (side, tile, weight) in enumerate(zip(sides, places, weights, strict=True)):
            is_first, is_kept = k == 0, bool(members)
            factor = finished(side, tile, z_RV if is_kept or not is_first else total_RV)
            if is_first and not is_kept:
                total_RV.mul_(weight * factor)
            elif is_first:
                torch.mul(z_RV, weight * factor, out=total_RV)
            else:
                total_RV.add_(z_RV, alpha=weight * factor)
            if is_kept:
                fold(z_RV, tile, plans[k + 1], members[k], None)
        fold(total_RV, places[0], plans[0], sums[0], None)


def kept_rows(
    sides: Sequence[Side], target_N: Tensor, weights: Sequence[float] | None, workspace_bytes: int
) -> Kept:
    """Keep exp(z − m) of a few rows under every head, and combine the probabilities.

    Args:
        sides: the heads.
        target_N: ids of the columns.
        weights: of a mean of probabilities; None: their maximum.
        workspace_bytes: what is kept.
    """
    first, V = sides[0], sides[0].columns
    buffer, found = Buffer(first.hidden_ND), []
    for rows in chunks_of(first, len(sides) * V * first.dtype.itemsize, workspace_bytes):
        some = [some_rows(side, rows) for side in sides]
        found.append(_kept_chunk(some, target_N[rows], weights, buffer))
    if found:
        result = Kept(*(torch.cat(parts, -1) for parts in zip(*found, strict=True)))
        for side, lse_N in zip(sides, result.lse_KN, strict=True):
            side.check_finite(lse_N)
        return result
    of_K = first.hidden_ND.new_empty((len(sides), 0), dtype=first.dtype)
    return Kept(of_K, of_K, of_K, of_K, of_K[0], of_K[0], of_K[0])


def _kept_chunk(
    sides: Sequence[Side], target_R: Tensor, weights: Sequence[float] | None, buffer: Buffer
) -> Kept:
    K, R, V, dtype = len(sides), len(target_R), sides[0].columns, sides[0].dtype
    cut = [tiles_of(side, R) for side in sides]
    kept = buffer.get("kept", 1, K * R * V, dtype)[0]
    sums, plans = [fresh_sums(side) for side in sides], [plan_of(side, target_R, "cached") for side in sides]
    shift = torch.empty(len(cut[0]), K, R, dtype=dtype, device=target_R.device)
    for i, places in enumerate(zip(*cut, strict=True)):
        tile_KRV = _tile_of(kept, places[0], K, R)
        for k, (side, tile) in enumerate(zip(sides, places, strict=True)):
            z_RV = buffer.get("z", R, tile.end - tile.start, dtype)
            finished(side, tile, z_RV)
            fold(z_RV, tile, plans[k], sums[k], tile_KRV[k])
            shift[i, k] = sums[k].max_PN[0]
    scored_R = torch.ones_like(target_R, dtype=torch.bool)
    of_heads = [masses(one, scored_R, None) for one in sums]
    lse_KR = torch.stack([one.lse_N for one in of_heads])
    factor_KR = lse_KR.new_ones(K, 1) if weights is None else weights_as(weights, lse_KR)[:, None]
    totals = Totals.fresh(lse_KR[0])
    for i, tile in enumerate(cut[0]):
        part_KR, place_R = (shift[i] - lse_KR).exp() * factor_KR, target_R - tile.start
        tile_KRV = _tile_of(kept, tile, K, R)
        combine(tile_KRV, part_KR, place_R, totals, buffer, is_sum=weights is not None)
    return Kept(
        torch.stack([one.logp_N for one in of_heads]),
        lse_KR,
        torch.stack([one.max_PN[0] for one in sums]),
        torch.stack([one.z_target_N for one in sums]),
        *totals,
    )


def _tile_of(kept: Tensor, tile: Tile, K: int, R: int) -> Tensor:
    """Return what is kept of a tile, [K, R, columns], adjacent."""
    return kept[K * R * tile.start : K * R * tile.end].view(K, R, tile.end - tile.start)


def products_of(side: Side, row_N: Tensor, ids_NV: Tensor) -> Tensor:
    """Return the logits of columns that differ from token to token.

    Args:
        side: the head.
        row_N: int64, tokens.
        ids_NV: int64, of each token some columns.
    """
    places_NV = ids_NV if isinstance(side.rows, slice) else side.rows[ids_NV]
    weight_NVD = operand(side.head.weight_VD[places_NV], side.dtype)
    z_NV = operand(side.hidden_ND[row_N], side.dtype).unsqueeze(1).matmul(weight_NVD.mT)[:, 0]
    if side.bias_V is not None:
        z_NV = z_NV + side.bias_V[ids_NV]
    z_NV = z_NV * side.alpha
    return z_NV if side.cap is None else (z_NV / side.cap).tanh() * side.cap
