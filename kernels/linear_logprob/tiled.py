"""`linear_logprob` as a loop over tiles of the vocabulary: a GEMM with float32 output, and an epilogue.

    forward     z = hidden · weight_tileᵀ,  fold z into sums,  frozen: mean += exp(z − m) · weight_tile
    backward    dz from z, or from what was kept;  dhidden += dz · weight_tile;  dweight_tile = dzᵀ · hidden

    fold      z -> the running maximum of each part and sum without the target, the target's z, and exp(z − m)
              where it is kept
    rescale   the running Σ exp(z − m) weight of a frozen head, where m rose
    dlogits   z, or a kept exp(z − m) -> the gradient of z

All tokens meet one tile at a time, so dW is one contraction over all tokens, rounded once. On a GPU the dz of
several tiles lie side by side in 16 bits, and enter both GEMMs together: the float32 dX is read and written
less often, and their contraction is long. Epilogues are Triton's, or the same lines of torch: a tile of
torch's belongs to one part; one of Triton's may hold both, and takes the maximum, and the factor, of each
column's own. The formulas are those of `operation.py`.

Dimensions: N tokens, V the tile's rows of the head, D hidden size, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.head import logits
from tokenkit.kernels.head.logits import base_triton, logits_triton, slope_triton
from tokenkit.kernels.head.products import Gradients, add_product, operand
from tokenkit.kernels.head.tiles import Buffer
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton
from tokenkit.kernels.linear_logprob.plan import BOTH, Plan, Sums, Tile

FOLD_BLOCK_V = 8192  # columns that one program of _fold_kernel holds
BLOCK_V = 2048  # columns of one program of _dlogits_kernel
BLOCK_D = 1024  # hidden channels of one program of _rescale_kernel


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


@triton.jit
def _fold_kernel(
    z_ptr, bias_ptr, inside_ptr, place_ptr, max_ptr, sum_ptr, z_target_ptr, p_ptr,
    start, stride, p_stride, N, V,
    alpha, cap,
    FROZEN: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row: fold a tile of z into the row's running maximum and sum of each part.

    Where exp(z − m) is kept, `p_ptr`, the tile is one block; with FROZEN, times the softcap's slope.
    """
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 262k rows of 8192 columns
    target = tl.load(place_ptr + n) - start
    m = tl.load(max_ptr + n)
    s = tl.load(sum_ptr + n)
    z_target = 0.0
    if inside_ptr is not None:
        m_subset = tl.load(max_ptr + N + n)
        s_subset = tl.load(sum_ptr + N + n)
    for first in range(0, V, BLOCK_V):
        offs_v = first + tl.arange(0, BLOCK_V)
        mask = offs_v < V
        z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0)
        z, _ = logits_triton(z, bias_ptr, offs_v, mask, alpha, cap)
        is_target = offs_v == target
        z_target += tl.sum(tl.where(is_target, z, 0.0), axis=0)
        slope = slope_triton(z, cap)  # of the logit: what logits_triton has would stay in registers
        z = tl.where(mask, z, float("-inf"))
        if inside_ptr is not None:
            inside = tl.load(inside_ptr + offs_v, mask=mask, other=0) != 0
            m_new = tl.maximum(m, tl.max(tl.where(inside, float("-inf"), z), axis=0))
            base = base_triton(m_new)
            m_new_subset = tl.maximum(m_subset, tl.max(tl.where(inside, z, float("-inf")), axis=0))
            base_subset = base_triton(m_new_subset)
            p = tl.exp(z - tl.where(inside, base_subset, base))
            others = tl.where(is_target, 0.0, p)
            s_subset = s_subset * tl.exp(m_subset - base_subset)
            s_subset += tl.sum(tl.where(inside, others, 0.0), axis=0)
            m_subset = m_new_subset
            addend = tl.sum(tl.where(inside, 0.0, others), axis=0)
        else:
            m_new = tl.maximum(m, tl.max(z, axis=0))
            base = base_triton(m_new)
            p = tl.exp(z - base)
            others = tl.where(is_target, 0.0, p)
            addend = tl.sum(others, axis=0)
        s = s * tl.exp(m - base) + addend
        m = m_new
        if p_ptr is not None:
            if FROZEN:
                p = tl.where(mask, others * slope, 0.0)
            tl.store(p_ptr + n * p_stride + offs_v, p.to(p_ptr.dtype.element_ty), mask=mask)
    tl.store(max_ptr + n, m)
    tl.store(sum_ptr + n, s)
    if inside_ptr is not None:
        tl.store(max_ptr + N + n, m_subset)
        tl.store(sum_ptr + N + n, s_subset)
    if (target >= 0) & (target < V):
        tl.store(z_target_ptr + n, z_target)


@triton.jit
def _rescale_kernel(mean_ptr, shrink_ptr, D, BLOCK_D: tl.constexpr):
    """One program per row and stretch of D; rows whose maximum did not rise are left alone."""
    n = tl.program_id(0).to(tl.int64)  # n * D passes 2**31 at 524k rows of 4096
    shrink = tl.load(shrink_ptr + n)
    if shrink != 1.0:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = offs_d < D
        mean = tl.load(mean_ptr + n * D + offs_d, mask=mask, other=0.0)
        tl.store(mean_ptr + n * D + offs_d, mean * shrink, mask=mask)


@triton.jit
def _dlogits_kernel(
    z_ptr, bias_ptr, inside_ptr, place_ptr, max_ptr, factor_ptr, dz_target_ptr, dz_ptr,
    start, stride, dz_stride, N, V,
    alpha, cap,
    CACHED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and stretch of a tile: dz from z, or from a kept exp(z − m)."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 262k rows of 8192 columns
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + n)
    m = tl.load(max_ptr + n)
    if inside_ptr is not None:
        inside = tl.load(inside_ptr + offs_v, mask=mask, other=0) != 0
        factor = tl.where(inside, tl.load(factor_ptr + N + n), factor)
        m = tl.where(inside, tl.load(max_ptr + N + n), m)
    if CACHED:
        dz = z * factor
    else:
        z, slope = logits_triton(z, bias_ptr, offs_v, mask, alpha, cap)
        dz = tl.exp(z - m) * (factor * slope)
    is_target = offs_v == tl.load(place_ptr + n) - start
    dz = tl.where(is_target, tl.load(dz_target_ptr + n), dz)
    tl.store(dz_ptr + n * dz_stride + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def fold_warps(V: int) -> int:
    """Warps of one program of `_fold_kernel`: at most 32 numbers of the row in each thread."""
    return 8 if V > 2048 else 4


def fold(z_NV: Tensor, tile: Tile, plan: Plan, sums: Sums, p_NV: Tensor | None) -> None:
    """Fold a tile of products into `sums`; z_NV may be overwritten.

    Writes exp(z − m) to p_NV in the modes that keep it: `cached` as it is, `frozen` times the softcap's
    slope and 0 at the target.
    """
    if not plan.has_triton:
        _fold_torch(z_NV, tile, plan, sums, p_NV)
        return
    parts = slice(None) if tile.part == BOTH else slice(tile.part, None)
    N, V = z_NV.shape
    block = triton.next_power_of_2(V)
    if p_NV is None:
        block = min(block, FOLD_BLOCK_V)
    with on_device(z_NV):
        _fold_kernel[(N,)](
            z_NV, _bias(plan, tile), _inside(plan, tile), plan.place_N, sums.max_PN[parts],
            sums.sum_PN[parts], sums.z_target_N, p_NV,
            tile.start, z_NV.stride(0), 0 if p_NV is None else p_NV.stride(0), N, V,
            plan.side.alpha, plan.side.cap,
            FROZEN=plan.mode == "frozen", BLOCK_V=block, num_warps=fold_warps(block),
        )  # fmt: skip


def _fold_torch(z_NV: Tensor, tile: Tile, plan: Plan, sums: Sums, p_NV: Tensor | None) -> None:
    max_N, sum_N, cap = sums.max_PN[tile.part], sums.sum_PN[tile.part], plan.side.cap
    logits.finish(z_NV, _bias(plan, tile), plan.side.alpha, cap)
    slope_NV = logits.slope(z_NV, cap) if plan.mode == "frozen" and cap is not None else None
    column_N1, inside_N1 = _target_column(plan, tile)
    z_target_N1 = z_NV.gather(1, column_N1)
    sums.z_target_N.copy_(torch.where(inside_N1, z_target_N1, sums.z_target_N[:, None])[:, 0])

    m_N = torch.maximum(max_N, z_NV.amax(1))
    z_NV.sub_(m_N[:, None]).exp_()
    at_target_N1 = z_NV.gather(1, column_N1)
    z_NV.scatter_(1, column_N1, at_target_N1.masked_fill(inside_N1, 0))
    sum_N.mul_(torch.exp(max_N - m_N)).add_(z_NV.sum(1))
    max_N.copy_(m_N)
    if plan.mode == "cached":
        z_NV.scatter_(1, column_N1, at_target_N1)
    if slope_NV is not None:
        z_NV.mul_(slope_NV)
    if p_NV is not None and p_NV is not z_NV:
        p_NV.copy_(z_NV)


def rescale(mean_ND: Tensor, shrink_N: Tensor) -> None:
    """Multiply each row by its factor, in place."""
    if not runs_triton(mean_ND):
        mean_ND.mul_(shrink_N[:, None])
        return
    N, D = mean_ND.shape
    with on_device(mean_ND):
        _rescale_kernel[(N, triton.cdiv(D, BLOCK_D))](mean_ND, shrink_N, D, BLOCK_D=BLOCK_D)


def dlogits(z_NV: Tensor, tile: Tile, plan: Plan, rows: tuple[Tensor, Tensor, Tensor], dz_NV: Tensor) -> None:
    """Write the gradient of a tile's products to dz_NV.

    Args:
        z_NV: the products, overwritten; in mode `cached` the kept exp(z − m), left alone.
        tile: which rows of the head.
        plan: the call's plan.
        rows: the maximum m of each part [P, N], the factor of exp(z − m) there (in mode `cached`: of what
            was kept), and the gradient at the target [N].
        dz_NV: where to write; may be z_NV.
    """
    if not plan.has_triton:
        _dlogits_torch(z_NV, tile, plan, rows, dz_NV)
        return
    N, V = z_NV.shape
    max_PN, factor_PN, dz_target_N = rows
    parts = slice(None) if tile.part == BOTH else slice(tile.part, None)
    with on_device(z_NV):
        _dlogits_kernel[(N, triton.cdiv(V, BLOCK_V))](
            z_NV, _bias(plan, tile), _inside(plan, tile), plan.place_N, max_PN[parts], factor_PN[parts],
            dz_target_N, dz_NV,
            tile.start, z_NV.stride(0), dz_NV.stride(0), N, V,
            plan.side.alpha, plan.side.cap,
            CACHED=plan.mode == "cached", BLOCK_V=BLOCK_V,
        )  # fmt: skip


def _dlogits_torch(
    z_NV: Tensor, tile: Tile, plan: Plan, rows: tuple[Tensor, Tensor, Tensor], dz_NV: Tensor
) -> None:
    cap, dz_target_N = plan.side.cap, rows[2]
    max_N, factor_N = rows[0][tile.part], rows[1][tile.part]
    if plan.mode == "cached":
        torch.mul(z_NV, factor_N[:, None], out=dz_NV)
    else:
        logits.finish(z_NV, _bias(plan, tile), plan.side.alpha, cap)
        slope_NV = None if cap is None else logits.slope(z_NV, cap)
        torch.mul(z_NV.sub_(max_N[:, None]).exp_(), factor_N[:, None], out=dz_NV)
        if slope_NV is not None:
            dz_NV.mul_(slope_NV)
    column_N1, inside_N1 = _target_column(plan, tile)
    dz_N1 = torch.where(inside_N1, dz_target_N[:, None], dz_NV.gather(1, column_N1))
    dz_NV.scatter_(1, column_N1, dz_N1.to(dz_NV.dtype))


def _bias(plan: Plan, tile: Tile) -> Tensor | None:
    return None if plan.side.bias_V is None else plan.side.bias_V[tile.rows].contiguous()


def _inside(plan: Plan, tile: Tile) -> Tensor | None:
    return plan.inside_V[tile.rows] if tile.part == BOTH and plan.inside_V is not None else None


def _target_column(plan: Plan, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the target's column in the tile (any, where it lies elsewhere) and whether it lies inside."""
    column_N1 = plan.place_N[:, None] - tile.start
    width = tile.end - tile.start
    return column_N1.clamp(0, width - 1), (column_N1 >= 0) & (column_N1 < width)
