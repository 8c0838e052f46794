"""What `linear_logprob` does with one tile of logits: Triton epilogues, and the same lines of torch.

    fold      z -> the running maximum of its part and sum without the target, the target's z, and exp(z - m)
              where it is kept
    rescale   the running Σ exp(z - m) weight of a frozen head, where m rose
    dlogits   z, or a kept exp(z - m) -> the gradient of z

The formulas are those of `linear_logprob.py`. Dimensions: N tokens, V the tile's rows of the head, P parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton
from tokenkit.kernels.logprob_plan import Plan, Sums
from tokenkit.kernels.vocabulary import Tile

BLOCK_V = 2048  # columns of one program of _dlogits_kernel
BLOCK_D = 1024  # hidden channels of one program of _rescale_kernel


@triton.jit
def _fold_kernel(
    z_ptr, bias_ptr, position_ptr, max_ptr, sum_ptr, z_target_ptr, p_ptr, shift_ptr,
    start, V,
    alpha, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, CACHED: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row: fold a tile of z into the row's running maximum and sum of its part."""
    n = tl.program_id(0).to(tl.int64)  # n * V passes 2**31 at 262k rows of 8192 columns
    offs_v = tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * V + offs_v, mask=mask, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
    z *= alpha
    if HAS_CAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * z / cap) + 1.0)
        z = cap * tanh
    z = tl.where(mask, z, float("-inf"))

    m_old = tl.load(max_ptr + n)
    m = tl.maximum(m_old, tl.max(z, axis=0))
    p = tl.exp(z - m)
    shrink = tl.exp(m_old - m)
    target = tl.load(position_ptr + n) - start
    is_target = offs_v == target
    tl.store(max_ptr + n, m)
    others = tl.sum(tl.where(is_target, 0.0, p), axis=0)
    tl.store(sum_ptr + n, tl.load(sum_ptr + n) * shrink + others)

    if (target >= 0) & (target < V):
        tl.store(z_target_ptr + n, tl.sum(tl.where(is_target, z, 0.0), axis=0))
    if CACHED:
        tl.store(p_ptr + n * V + offs_v, p.to(p_ptr.dtype.element_ty), mask=mask)
        tl.store(shift_ptr + n, m)
    if FROZEN:
        if HAS_CAP:
            p *= tl.where(mask, 1.0 - (z / cap) * (z / cap), 0.0)  # z is −inf behind the end
        p = tl.where(is_target, 0.0, p)
        tl.store(p_ptr + n * V + offs_v, p.to(p_ptr.dtype.element_ty), mask=mask)
        tl.store(shift_ptr + n, shrink)


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
    z_ptr, bias_ptr, position_ptr, max_ptr, factor_ptr, dz_target_ptr, dz_ptr,
    start, V,
    alpha, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, CACHED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and stretch of a tile: dz from z, or from a kept exp(z - m)."""
    n = tl.program_id(0).to(tl.int64)  # n * V passes 2**31 at 262k rows of 8192 columns
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * V + offs_v, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + n)
    if CACHED:
        dz = z * factor
    else:
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
        z *= alpha
        if HAS_CAP:
            tanh = 1.0 - 2.0 / (tl.exp(2.0 * z / cap) + 1.0)
            z = cap * tanh
            factor = factor * (1.0 - tanh * tanh)
        dz = tl.exp(z - tl.load(max_ptr + n)) * factor
    is_target = offs_v == tl.load(position_ptr + n) - start
    dz = tl.where(is_target, tl.load(dz_target_ptr + n), dz)
    tl.store(dz_ptr + n * V + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def fold(
    z_NV: Tensor, bias_V: Tensor | None, tile: Tile, plan: Plan, sums: Sums, p_NV: Tensor | None
) -> Tensor:
    """Fold a tile of products into `sums`; z_NV may be overwritten.

    Writes exp(z - m) to p_NV in the modes that keep it: `cached` as it is, `frozen` times the softcap's
    slope and 0 at the target. Returns shift_N: m in mode `cached`, else exp(m before - m).
    """
    if runs_triton(z_NV):
        return _fold_triton(z_NV, bias_V, tile, plan, sums, p_NV)
    return _fold_torch(z_NV, bias_V, tile, plan, sums, p_NV)


def fold_warps(V: int) -> int:
    """Warps of one program of `_fold_kernel`: at most 32 numbers of the row in each thread."""
    return 8 if V > 2048 else 4


def _fold_triton(
    z_NV: Tensor, bias_V: Tensor | None, tile: Tile, plan: Plan, sums: Sums, p_NV: Tensor | None
) -> Tensor:
    N, V = z_NV.shape
    shift_N = torch.empty_like(sums.z_target_N)
    with on_device(z_NV):
        _fold_kernel[(N,)](
            z_NV, bias_V, plan.position_N, sums.max_PN[tile.part], sums.sum_PN[tile.part],
            sums.z_target_N, p_NV, shift_N,
            tile.start, V,
            plan.alpha, plan.cap or 1.0,
            HAS_BIAS=bias_V is not None, HAS_CAP=plan.cap is not None,
            CACHED=plan.mode == "cached", FROZEN=plan.mode == "frozen",
            BLOCK_V=triton.next_power_of_2(V), num_warps=fold_warps(V),
        )  # fmt: skip
    return shift_N


def _fold_torch(
    z_NV: Tensor, bias_V: Tensor | None, tile: Tile, plan: Plan, sums: Sums, p_NV: Tensor | None
) -> Tensor:
    max_N, sum_N = sums.max_PN[tile.part], sums.sum_PN[tile.part]
    slope_NV = _transform(z_NV, bias_V, plan, with_slope=plan.mode == "frozen")
    column_N1, inside_N1 = _target_column(plan, tile)
    z_target_N1 = z_NV.gather(1, column_N1)
    sums.z_target_N.copy_(torch.where(inside_N1, z_target_N1, sums.z_target_N[:, None])[:, 0])

    m_N = torch.maximum(max_N, z_NV.amax(1))
    shrink_N = torch.exp(max_N - m_N)
    z_NV.sub_(m_N[:, None]).exp_()
    at_target_N1 = z_NV.gather(1, column_N1)
    z_NV.scatter_(1, column_N1, at_target_N1.masked_fill(inside_N1, 0))
    sum_N.mul_(shrink_N).add_(z_NV.sum(1))
    max_N.copy_(m_N)
    if plan.mode == "cached":
        z_NV.scatter_(1, column_N1, at_target_N1)
    if slope_NV is not None:
        z_NV.mul_(slope_NV)
    if p_NV is not None and p_NV is not z_NV:
        p_NV.copy_(z_NV)
    return m_N if plan.mode == "cached" else shrink_N


def rescale(mean_ND: Tensor, shrink_N: Tensor) -> None:
    """Multiply each row by its factor, in place."""
    if not runs_triton(mean_ND):
        mean_ND.mul_(shrink_N[:, None])
        return
    N, D = mean_ND.shape
    with on_device(mean_ND):
        _rescale_kernel[(N, triton.cdiv(D, BLOCK_D))](mean_ND, shrink_N, D, BLOCK_D=BLOCK_D)


def dlogits(
    z_NV: Tensor,
    bias_V: Tensor | None,
    tile: Tile,
    plan: Plan,
    row_N: tuple[Tensor, Tensor, Tensor],
    dz_NV: Tensor,
) -> None:
    """Write the gradient of a tile's products to dz_NV.

    Args:
        z_NV: the products, overwritten; in mode `cached` the kept exp(z - m), left alone.
        bias_V: the tile's bias.
        tile: which rows of the head.
        plan: the call's plan.
        row_N: the maximum m of the tile's part, the factor of exp(z - m) (in mode `cached`: of what was
            kept), and the gradient at the target.
        dz_NV: where to write; may be z_NV.
    """
    max_N, factor_N, dz_target_N = row_N
    if not runs_triton(z_NV):
        _dlogits_torch(z_NV, bias_V, tile, plan, row_N, dz_NV)
        return
    N, V = z_NV.shape
    with on_device(z_NV):
        _dlogits_kernel[(N, triton.cdiv(V, BLOCK_V))](
            z_NV, bias_V, plan.position_N, max_N, factor_N, dz_target_N, dz_NV,
            tile.start, V,
            plan.alpha, plan.cap or 1.0,
            HAS_BIAS=bias_V is not None, HAS_CAP=plan.cap is not None, CACHED=plan.mode == "cached",
            BLOCK_V=BLOCK_V,
        )  # fmt: skip


def _dlogits_torch(
    z_NV: Tensor,
    bias_V: Tensor | None,
    tile: Tile,
    plan: Plan,
    row_N: tuple[Tensor, Tensor, Tensor],
    dz_NV: Tensor,
) -> None:
    max_N, factor_N, dz_target_N = row_N
    if plan.mode == "cached":
        torch.mul(z_NV, factor_N[:, None], out=dz_NV)
    else:
        slope_NV = _transform(z_NV, bias_V, plan, with_slope=True)
        torch.mul(z_NV.sub_(max_N[:, None]).exp_(), factor_N[:, None], out=dz_NV)
        if slope_NV is not None:
            dz_NV.mul_(slope_NV)
    column_N1, inside_N1 = _target_column(plan, tile)
    dz_N1 = torch.where(inside_N1, dz_target_N[:, None], dz_NV.gather(1, column_N1))
    dz_NV.scatter_(1, column_N1, dz_N1.to(dz_NV.dtype))


def _transform(z_NV: Tensor, bias_V: Tensor | None, plan: Plan, *, with_slope: bool) -> Tensor | None:
    """Turn products into z, in place; return the softcap's slope 1 - (z / cap)² where there is one."""
    if bias_V is not None:
        z_NV.add_(bias_V.to(z_NV.dtype))
    if plan.alpha != 1:
        z_NV.mul_(plan.alpha)
    if plan.cap is None:
        return None
    z_NV.div_(plan.cap).tanh_()
    slope_NV = 1 - z_NV.square() if with_slope else None
    z_NV.mul_(plan.cap)
    return slope_NV


def _target_column(plan: Plan, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the target's column in the tile (any, where it lies elsewhere) and whether it lies inside."""
    column_N1 = plan.position_N[:, None] - tile.start
    width = tile.end - tile.start
    return column_N1.clamp(0, width - 1), (column_N1 >= 0) & (column_N1 < width)
