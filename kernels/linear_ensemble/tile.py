"""A tile of what every head says, combined: a Triton kernel, and the same lines of torch.

    t(v) = Σ_k f_k e_k(v)   or   max_k f_k e_k(v)        e_k = exp(z_k − m_k),  f_k = w_k exp(m_k − lse_k)

Folded into numbers of a row: of the sum, t at the target and the largest t; of the largest, Σ t.

Dimensions: K heads, N tokens, V columns of the tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head.tiles import Buffer
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton

BLOCK_V = 1024  # columns that one program holds at a time


class Totals(NamedTuple):
    """Running numbers of each row, those of the other combination 0."""

    at_target_N: Tensor
    most_N: Tensor
    sum_N: Tensor

    @classmethod
    def fresh(cls, like_N: Tensor) -> Totals:
        """Return those of no columns."""
        return cls(torch.zeros_like(like_N), torch.zeros_like(like_N), torch.zeros_like(like_N))


@triton.jit
def _combine_kernel(
    kept_ptr, factor_ptr, place_ptr, target_ptr, most_ptr, sum_ptr,
    N, V,
    K: tl.constexpr, IS_SUM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row: fold a tile of all heads into the row's three numbers."""
    n = tl.program_id(0).to(tl.int64)  # K * N * V passes 2**31 at 131k rows of 8192 columns
    place = tl.load(place_ptr + n)
    at_target = tl.load(target_ptr + n)
    most = tl.load(most_ptr + n)
    total = tl.load(sum_ptr + n)
    for first in range(0, V, BLOCK_V):
        offs_v = first + tl.arange(0, BLOCK_V)
        mask = offs_v < V
        t = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for k in tl.static_range(K):
            e = tl.load(kept_ptr + (k * N + n) * V + offs_v, mask=mask, other=0.0)
            e *= tl.load(factor_ptr + k * N + n)
            t = t + e if IS_SUM else tl.maximum(t, e)
        if IS_SUM:
            at_target += tl.sum(tl.where(offs_v == place, t, 0.0), axis=0)
            most = tl.maximum(most, tl.max(t, axis=0))
        else:
            total += tl.sum(t, axis=0)
    if IS_SUM:
        tl.store(target_ptr + n, at_target)
        tl.store(most_ptr + n, most)
    else:
        tl.store(sum_ptr + n, total)


def combine(
    kept_KNV: Tensor, factor_KN: Tensor, place_N: Tensor, totals: Totals, buffer: Buffer, *, is_sum: bool
) -> None:
    """Fold a tile into `totals`.

    Args:
        kept_KNV: exp(z − m) of each head, adjacent.
        factor_KN: what makes probabilities of them, the heads' weights in it.
        place_N: int64, the target's column, which may lie elsewhere.
        totals: overwritten.
        buffer: of torch's lines: what was kept is only read, or a CPU would write all of it back.
        is_sum: add the heads up; otherwise the largest counts.
    """
    K, N, V = kept_KNV.shape
    if runs_triton(kept_KNV):
        with on_device(kept_KNV):
            _combine_kernel[(N,)](
                kept_KNV, factor_KN.contiguous(), place_N, *totals, N, V,
                K=K, IS_SUM=is_sum, BLOCK_V=BLOCK_V,
            )  # fmt: skip
        return
    total_NV, one_NV = (buffer.get(name, N, V, kept_KNV.dtype) for name in ("total", "z"))
    torch.mul(kept_KNV[0], factor_KN[0, :, None], out=total_NV)
    for e_NV, factor_N in zip(kept_KNV[1:], factor_KN[1:], strict=True):
        if is_sum:
            total_NV.addcmul_(e_NV, factor_N[:, None])
        else:
            torch.maximum(total_NV, torch.mul(e_NV, factor_N[:, None], out=one_NV), out=total_NV)
    if not is_sum:
        totals.sum_N.add_(total_NV.sum(1))
        return
    column_N1 = place_N[:, None].clamp(0, V - 1)
    inside_N1 = (place_N >= 0)[:, None] & (place_N < V)[:, None]
    totals.at_target_N.add_(torch.where(inside_N1, total_NV.gather(1, column_N1), 0)[:, 0])
    torch.maximum(totals.most_N, total_NV.amax(1), out=totals.most_N)
