"""From products to logits, and the maximum and sum of a row: torch's lines, and Triton's for other kernels.

    z = softcap(scale (hidden · weight + bias)) / temperature
      = α (product + bias),  or  cap · tanh(α (product + bias) / cap)       α = scale / T,  cap = softcap / T
    ∂z/∂(α (product + bias)) = 1,  or  1 − (z / cap)²

A change of the head (a second softcap, a scale per row) is made here: `finish` and `slope` once in torch,
once as functions that kernels call. A bias or a cap that is None is left out when a kernel is compiled.

Dimensions: N tokens, V columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton

BLOCK_V = 2048  # columns of a row that one program holds
GROUP_BYTES = 2**20  # of one operand of torch's lines: its temporaries stay in the cache


@triton.jit
def tanh_triton(x):
    """tanh, of which Triton has none on every backend."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def logits_triton(z, bias_ptr, offs_v, mask, alpha, cap):
    """Products to logits and their slopes, one row or [rows, columns]. bias_ptr and cap may be None."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
        if len(z.shape) == 2:
            bias = bias[None, :]
        z += bias
    z *= alpha
    slope = 1.0
    if cap is not None:
        tanh = tanh_triton(z / cap)
        z = cap * tanh
        slope = 1.0 - tanh * tanh
    return z, slope


@triton.jit
def slope_triton(z, cap):
    """How much a logit moves with α times its product, where the logit alone is at hand."""
    slope = 1.0
    if cap is not None:
        slope = 1.0 - (z / cap) * (z / cap)
    return slope


@triton.jit
def base_triton(m):
    """What to subtract before exp: a maximum, or 0 where nothing was seen yet, so that exp(-inf) is 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _finish_kernel(z_ptr, bias_ptr, stride, V, alpha, cap, BLOCK_V: tl.constexpr):
    """One program per row and block: products to logits, in place."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0)
    z, _ = logits_triton(z, bias_ptr, offs_v, mask, alpha, cap)
    tl.store(z_ptr + n * stride + offs_v, z, mask=mask)


@triton.jit
def _row_sums_kernel(z_ptr, share_ptr, max_ptr, sum_ptr, stride, V, alpha, BLOCK_V: tl.constexpr):
    """One program per row: an online log-sum-exp."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    m = float("-inf")
    s = 0.0
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask = offs_v < V
        z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0) * alpha
        z = tl.where(mask, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, axis=0))
        base = base_triton(m_new)
        z -= base
        if share_ptr is not None:
            z += tl.load(share_ptr + offs_v, mask=mask, other=0.0)
        s = s * tl.exp(m - base) + tl.sum(tl.exp(z), axis=0)
        m = m_new
    tl.store(max_ptr + n, m)
    tl.store(sum_ptr + n, s)


def finish(z_NV: Tensor, bias_V: Tensor | None, alpha: float, cap: float | None) -> float:
    """Turn products into logits in place; return the factor that is left to the reader of z_NV.

    Args:
        z_NV: hidden · weightᵀ.
        bias_V: of the columns.
        alpha: scale over temperature.
        cap: softcap over temperature.
    """
    N, V = z_NV.shape
    if runs_triton(z_NV):
        if bias_V is None and cap is None:
            return alpha
        if N and V:
            with on_device(z_NV):
                _finish_kernel[(N, triton.cdiv(V, BLOCK_V))](
                    z_NV, bias_V, z_NV.stride(0), V, alpha, cap, BLOCK_V=BLOCK_V
                )
        return 1.0
    if bias_V is None and cap is None and alpha == 1:
        return 1.0
    for rows in groups(z_NV):
        z = z_NV[rows]
        if bias_V is not None:
            z.add_(bias_V)
        if cap is not None:
            z.mul_(alpha / cap).tanh_().mul_(cap)
        elif alpha != 1:
            z.mul_(alpha)
    return 1.0


def slope(z_NV: Tensor, cap: float, out: Tensor | None = None) -> Tensor:
    """Return 1 − (z / cap)², in `out` if there is one, which may be z_NV."""
    return torch.div(z_NV, cap, out=out).square_().neg_().add_(1)


def row_sums(z_NV: Tensor, alpha: float = 1.0, share_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row (−inf of no columns) and Σ share · exp(z − max).

    Args:
        z_NV: logits, up to `alpha`; where torch's lines run, alpha is 1.
        alpha: the factor.
        share_V: log of the part that this column has of an id that stands in several.
    """
    N, V = z_NV.shape
    max_N, sum_N = (torch.full_like(z_NV[:, 0], x) if V else z_NV.new_full((N,), x) for x in (-torch.inf, 0))
    if not (N and V):
        return max_N, sum_N
    if runs_triton(z_NV):
        with on_device(z_NV):
            _row_sums_kernel[(N,)](z_NV, share_V, max_N, sum_N, z_NV.stride(0), V, alpha, BLOCK_V=BLOCK_V)
        return max_N, sum_N
    for rows in groups(z_NV):
        max_N[rows] = z_NV[rows].amax(1)
        base_N1 = max_N[rows, None].masked_fill(max_N[rows, None] == -torch.inf, 0)
        z = z_NV[rows] - base_N1
        sum_N[rows] = (z if share_V is None else z.add_(share_V)).exp_().sum(1)
    return max_N, sum_N


def groups(z_NV: Tensor) -> Iterator[slice]:
    """Yield rows few enough that torch's temporaries of them stay in the cache."""
    step = max(GROUP_BYTES // (z_NV.shape[1] * z_NV.itemsize or 1), 1)
    for start in range(0, len(z_NV), step):
        yield slice(start, start + step)
