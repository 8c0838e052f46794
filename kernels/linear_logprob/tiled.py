"""`linear_logprob` as a loop over tiles of the vocabulary: a GEMM with float32 output, and an epilogue.

    forward     z = hidden · weight_tileᵀ,  fold z into sums,  frozen: mean += exp(z − m) · weight_tile
    backward    dz from z, or from what was kept;  dhidden += dz · weight_tile;  dweight_tile = dzᵀ · hidden

All tokens meet one tile at a time, so dW is one contraction over all tokens, rounded once. On a GPU the dz of
several tiles lie side by side in 16 bits, and enter both GEMMs together: the float32 dX is read and written
less often, and their contraction is long.

Dimensions: N tokens, V the tile's rows of the head, D hidden size, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.head.products import add_product, operand
from tokenkit.kernels.head.subset import Tile
from tokenkit.kernels.head.sums import Gradients
from tokenkit.kernels.head.tiles import Buffer
from tokenkit.kernels.linear_logprob.plan import Plan, Sums
from tokenkit.kernels.linear_logprob.tile import dlogits, fold, rescale


def forward(plan: Plan, sums: Sums, kept: Tensor, shift: Tensor) -> None:
    """Fold every row of the head that is here into `sums`.

    Args:
        plan: the call's plan.
        sums: maximum −inf, the rest 0.
        kept: mode `frozen`: zeros [parts, N, D], to which exp(z - m) W is added; `cached`: [N·V], exp(z - m).
        shift: mode `cached`: [tiles, P, N], the m of each tile and part.
    """
    side, N = plan.side, len(plan.side.hidden_ND)
    buffer = Buffer(side.hidden_ND)
    for i, tile in enumerate(plan.tiles):
        weight = operand(side.head.weight_VD[tile.rows], plan.dtype)
        V = tile.end - tile.start
        p_NV = _kept(kept, tile, N) if plan.mode == "cached" else None
        z_NV = buffer.get("z", N, V, plan.dtype) if p_NV is None or p_NV.dtype != plan.dtype else p_NV
        side.products(z_NV, weight)
        if plan.mode == "frozen":
            p_NV = z_NV if z_NV.dtype == side.low else buffer.get("p", N, V, side.low)
        before_N = sums.max_PN[tile.part].clone() if plan.mode == "frozen" else None
        fold(z_NV, tile, plan, sums, p_NV)
        if plan.mode == "cached":
            shift[i] = sums.max_PN
        if before_N is not None and p_NV is not None:
            rescale(kept[tile.part], torch.exp(before_N - sums.max_PN[tile.part]))
            add_product(kept[tile.part], operand(p_NV, plan.dtype), weight)


def backward(
    rows: tuple[Tensor, Tensor, Tensor], kept: tuple[Tensor, Tensor], plan: Plan, gradients: Gradients
) -> None:
    """Add up the gradients.

    Args:
        rows: the maximum m of each part [P, N], the factor of exp(z − m) in each part, dz at the target.
        kept: what a `cached` forward kept, and its shift; else ignored.
        plan: the call's plan, mode `cached` or `recompute`.
        gradients: padding rows are not written.
    """
    side, N = plan.side, len(plan.side.hidden_ND)
    buffer, tokens, i = Buffer(side.hidden_ND), slice(0, N), 0
    for stretch in plan.stretches:
        first, last = stretch[0].start, stretch[-1].end
        fetched = operand(side.head.weight_VD[stretch[0].rows], plan.dtype) if len(stretch) == 1 else None
        whole_NV = buffer.get("dz", N, last - first, side.low) if plan.dtype != side.low else None
        for tile in stretch:
            V = tile.end - tile.start
            if plan.mode == "cached":
                z_NV = _kept(kept[0], tile, N)
                grown_PN = torch.where(rows[0] > -torch.inf, torch.exp(kept[1][i] - rows[0]), 0)
                numbers = rows[0], rows[1] * grown_PN, rows[2]
            else:
                z_NV, numbers = buffer.get("z", N, V, plan.dtype), rows
                weight = fetched if fetched is not None else side.head.weight_VD[tile.rows]
                side.products(z_NV, operand(weight, plan.dtype))
            if whole_NV is not None:
                dz_NV = whole_NV[:, tile.start - first : tile.end - first]
            else:
                dz_NV = buffer.get("kept dz", N, V, side.low) if plan.mode == "cached" else z_NV
            if N:
                dlogits(z_NV, tile, plan, numbers, dz_NV)
            i += 1
        together = dz_NV if whole_NV is None else whole_NV
        rows_of = stretch[0].rows if len(stretch) == 1 else slice(first, last)
        gradients.add(together, rows_of, tokens, fetched)


def _kept(kept: Tensor, tile: Tile, N: int) -> Tensor:
    """Return the exp(z − m) of a tile, where they are kept."""
    return kept[N * tile.start : N * tile.end].view(N, tile.end - tile.start)
