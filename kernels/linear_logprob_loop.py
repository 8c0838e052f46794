"""`linear_logprob` as a loop over tiles of the vocabulary: a GEMM with float32 output, and an epilogue.

    forward     z = hidden · weight_tileᵀ,  fold z into sums,  frozen: mean += exp(z − m) · weight_tile
    backward    dz from z, or from what was kept;  dhidden += dz · weight_tile;  dweight_tile = dzᵀ · hidden

All tokens meet one tile at a time, so dW is one contraction over all tokens, rounded once.

Dimensions: N tokens, V the tile's rows of the head, D hidden size, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.logprob_plan import Plan, Sums
from tokenkit.kernels.logprob_tile import dlogits, fold, rescale
from tokenkit.kernels.products import Work, add_product, operand, product, write_product
from tokenkit.kernels.vocabulary import Tile


def forward(
    parameters: tuple[Tensor, Tensor, Tensor | None], plan: Plan, sums: Sums, kept: Tensor, shift: Tensor
) -> None:
    """Fold every row of the head that is here into `sums`.

    Args:
        parameters: hidden, weight, bias.
        plan: the call's plan.
        sums: maximum −inf, the rest 0.
        kept: mode `frozen`: zeros [parts, N, D], to which exp(z - m) W is added; `cached`: [N·V], exp(z - m).
        shift: mode `cached`: [tiles, N], the m of each tile.
    """
    hidden_ND, weight_VD, bias_V = parameters
    operand_ND = operand(hidden_ND, plan)
    work = Work(hidden_ND, plan)
    N = len(hidden_ND)
    for i, tile in enumerate(plan.tiles):
        weight_tile = operand(weight_VD[tile.rows], plan)
        p_NV = None
        if plan.mode == "cached":
            p_NV = kept[N * tile.start : N * tile.end].view(N, tile.end - tile.start)
        keeps_z = p_NV is not None and p_NV.dtype == plan.dtype
        z_NV = product(
            operand_ND,
            weight_tile.T,
            p_NV if p_NV is not None and keeps_z else work.tile("z", tile, plan.dtype),
        )
        if plan.mode == "frozen":
            p_NV = z_NV if z_NV.dtype == work.low else work.tile("p", tile, work.low)
        shift_N = fold(z_NV, _bias_tile(bias_V, tile), tile, plan, sums, p_NV)
        if plan.mode == "cached":
            shift[i] = shift_N
        if plan.mode == "frozen":
            assert p_NV is not None
            rescale(kept[tile.part], shift_N)
            add_product(kept[tile.part], operand(p_NV, plan), weight_tile)


def backward(
    parameters: tuple[Tensor, Tensor, Tensor | None],
    rows: tuple[Tensor, Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    plan: Plan,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Add the gradient of hidden, write those of weight and bias; where a gradient is None it is left out.

    Args:
        parameters: hidden, weight, bias.
        rows: the maximum m of each part [P, N], the factor of exp(z − m) in each part, dz at the target.
        kept: what a `cached` forward kept, and its shift; else ignored.
        plan: the call's plan, mode `cached` or `recompute`.
        gradients: float32 (float64) zeros [N, D]; like weight; like bias. Padding rows are not written.
    """
    hidden_ND, weight_VD, bias_V = parameters
    max_PN, factor_PN, dz_target_N = rows
    dhidden_ND, dweight_VD, dbias_V = gradients
    operand_ND = operand(hidden_ND, plan)
    work = Work(hidden_ND, plan)
    N = len(hidden_ND)
    for i, tile in enumerate(plan.backward_tiles):
        weight_tile = operand(weight_VD[tile.rows], plan)
        max_N, factor_N = max_PN[tile.part], factor_PN[tile.part]
        if plan.mode == "cached":
            z_NV = kept[0][N * tile.start : N * tile.end].view(N, tile.end - tile.start)
            factor_N = factor_N * torch.exp(kept[1][i] - max_N)
            dz_NV = work.tile("dz", tile, work.low)
        else:
            z_NV = product(operand_ND, weight_tile.T, work.tile("z", tile, plan.dtype))
            dz_NV = z_NV if z_NV.dtype == work.low else work.tile("dz", tile, work.low)
        if N:
            dlogits(z_NV, _bias_tile(bias_V, tile), tile, plan, (max_N, factor_N, dz_target_N), dz_NV)
        dz_NV = operand(dz_NV, plan)
        if dhidden_ND is not None:
            add_product(dhidden_ND, dz_NV, weight_tile)
        if dweight_VD is not None:
            write_product(dweight_VD, tile.rows, dz_NV.T, operand_ND)
        if dbias_V is not None:
            dbias_V[tile.rows] = dz_NV.sum(0, dtype=plan.dtype).to(dbias_V.dtype)


def _bias_tile(bias_V: Tensor | None, tile: Tile) -> Tensor | None:
    return None if bias_V is None else bias_V[tile.rows].contiguous()
