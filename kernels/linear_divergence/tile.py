"""What `linear_divergence` does with logits of two models: Triton epilogues, and the same lines of torch.

    divergence_sums  two rows of logits -> the divergence, and the sums that its gradient needs
    gradient         two tiles of logits -> dz of the first, over it or into another buffer
    rest_gradient    logits that all belong to one outcome -> their dz

`z` is a logit up to a factor alpha, which every kernel applies: 1 where `head/logits.py` applied it. The
formulas are those of `terms.py`. Dimensions: N tokens, V columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head import logits
from tokenkit.kernels.head.logits import slope_triton
from tokenkit.kernels.kinds import MIXED
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton
from tokenkit.kernels.linear_divergence.terms import LOWEST, gradients, logs, terms, terms_triton

BLOCK_V = 2048  # columns of a row that one program holds
SUM_WARPS = 8  # of a program of _divergence_sums_kernel: 8 columns in each thread


class Measure(NamedTuple):
    """Which divergence, and the factors that turn stored numbers into logits."""

    kind: str
    skew: float
    alpha: float
    """Of the model whose gradient is meant, or of the student."""
    other_alpha: float
    cap: float | None
    """Softcap over temperature, of the model whose gradient is meant."""


class RowSums(NamedTuple):
    """Sums over a row's outcomes, nats."""

    value_N: Tensor
    centre_N: Tensor
    """Σ e of the student."""
    teacher_centre_N: Tensor
    """Σ e with student and teacher in each other's place; 0 where nobody asked for it."""
    p_N: Tensor
    q_N: Tensor
    shared_N: Tensor
    """Σ p q/m of skl and srkl."""


class GradientRows(NamedTuple):
    """The numbers of each row that turn its logits into dz."""

    lse_N: Tensor
    other_lse_N: Tensor
    centre_N: Tensor
    """Σ e; with shares, plus κ Σ p."""
    weight_N: Tensor
    """w of akl; the form of skl."""
    factor_N: Tensor
    """Upstream gradient times scale over temperature."""
    kappa_N: Tensor
    """κ; read with shares only."""
    top_N: Tensor
    """The maximum that `lse_N` is measured from."""
    other_top_N: Tensor


@triton.jit
def _divergence_sums_kernel(
    z_ptr, other_ptr, lse_ptr, other_lse_ptr, weight_ptr, sums_ptr,
    stride, other_stride, N, V,
    alpha, other_alpha, skew,
    KIND: tl.constexpr, MIRROR: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row: the divergence, Σ e (of the teacher too where MIRROR names its kind), Σ p, Σ q."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    top = tl.load(lse_ptr + 2 * n)
    lse = tl.load(lse_ptr + 2 * n + 1)
    other_top = tl.load(other_lse_ptr + 2 * n)
    other_lse = tl.load(other_lse_ptr + 2 * n + 1)
    weight = tl.load(weight_ptr + n)
    value = 0.0
    centre = 0.0
    other_centre = 0.0
    mass = 0.0
    other_mass = 0.0
    overlap = 0.0
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask = offs_v < V
        log_p = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0) * alpha - top
        log_q = tl.load(other_ptr + n * other_stride + offs_v, mask=mask, other=0.0) * other_alpha - other_top
        log_p, log_q = tl.maximum(log_p, LOWEST), tl.maximum(log_q, LOWEST)
        d = log_q - log_p - (other_lse - lse)
        log_p, log_q = log_p - lse, log_q - other_lse
        mass += tl.sum(tl.where(mask, tl.exp(log_p), 0.0), axis=0)
        other_mass += tl.sum(tl.where(mask, tl.exp(log_q), 0.0), axis=0)
        term, e, shared = terms_triton(log_p, log_q, d, skew, weight, KIND)
        value += tl.sum(tl.where(mask, term, 0.0), axis=0)
        centre += tl.sum(tl.where(mask, e, 0.0), axis=0)
        if KIND == "skl" or KIND == "srkl":
            overlap += tl.sum(tl.where(mask, shared, 0.0), axis=0)
        if MIRROR is not None:
            _, e, _ = terms_triton(log_q, log_p, -d, skew, 1.0 - weight, MIRROR)
            other_centre += tl.sum(tl.where(mask, e, 0.0), axis=0)
    tl.store(sums_ptr + n, value)
    tl.store(sums_ptr + N + n, centre)
    tl.store(sums_ptr + 2 * N + n, other_centre)
    tl.store(sums_ptr + 3 * N + n, mass)
    tl.store(sums_ptr + 4 * N + n, other_mass)
    tl.store(sums_ptr + 5 * N + n, overlap)


@triton.jit
def _gradient_kernel(
    z_ptr, other_ptr, rows_ptr, share_ptr, dz_ptr,
    stride, other_stride, dz_stride, N, V,
    alpha, other_alpha, skew, cap,
    KIND: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and block: dz. `rows_ptr` is `GradientRows`, one row of numbers after the other."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0)
    other = tl.load(other_ptr + n * other_stride + offs_v, mask=mask, other=0.0)
    log_p = tl.maximum(z * alpha - tl.load(rows_ptr + 6 * N + n), LOWEST)
    log_q = tl.maximum(other * other_alpha - tl.load(rows_ptr + 7 * N + n), LOWEST)
    lse, other_lse = tl.load(rows_ptr + n), tl.load(rows_ptr + N + n)
    d = log_q - log_p - (other_lse - lse)
    log_p, log_q = log_p - lse, log_q - other_lse
    centre = tl.load(rows_ptr + 2 * N + n)
    _, e, _ = terms_triton(log_p, log_q, d, skew, tl.load(rows_ptr + 3 * N + n), KIND)
    if share_ptr is not None:
        share = tl.exp(tl.load(share_ptr + offs_v, mask=mask, other=0.0))
        e -= tl.exp(log_p) * (centre * share - tl.load(rows_ptr + 5 * N + n))
    else:
        e -= tl.exp(log_p) * centre
    e *= tl.load(rows_ptr + 4 * N + n) * slope_triton(z, cap)
    tl.store(dz_ptr + n * dz_stride + offs_v, e.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rest_gradient_kernel(
    z_ptr, lse_ptr, factor_ptr, dz_ptr,
    stride, dz_stride, V,
    alpha, cap,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and block: factor · exp(z − maximum − lse)."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0)
    log_p = z * alpha - tl.load(lse_ptr + 2 * n) - tl.load(lse_ptr + 2 * n + 1)
    dz = tl.exp(log_p) * tl.load(factor_ptr + n) * slope_triton(z, cap)
    tl.store(dz_ptr + n * dz_stride + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def divergence_sums(
    z_NV: Tensor,
    other_NV: Tensor,
    lse: tuple[Tensor, Tensor],
    weight_N: Tensor,
    measure: Measure,
    mirror: str | None,
) -> RowSums:
    """Return the sums of each row over the outcomes that stand opposite each other.

    Args:
        z_NV: the student's logits, up to a factor.
        other_NV: the teacher's.
        lse: [N, 2] each, the student's and the teacher's: a row's maximum, and log Σ exp(z − maximum).
        weight_N: w of akl.
        measure: kind and factors.
        mirror: the kind as the teacher sees it, if its gradient is wanted.
    """
    N, V = z_NV.shape
    sums_6N = z_NV.new_zeros((6, N))
    if not (N and V):
        return RowSums(*sums_6N.unbind())
    if runs_triton(z_NV):
        with on_device(z_NV):
            _divergence_sums_kernel[(N,)](
                z_NV, other_NV, lse[0], lse[1], weight_N, sums_6N,
                z_NV.stride(0), other_NV.stride(0), N, V,
                measure.alpha, measure.other_alpha, measure.skew,
                KIND=measure.kind, MIRROR=mirror, BLOCK_V=BLOCK_V, num_warps=SUM_WARPS,
            )  # fmt: skip
        return RowSums(*sums_6N.unbind())
    for rows in logits.groups(z_NV):
        own, others = (x_N2[rows].split(1, 1) for x_N2 in lse)
        log_p, log_q, d = logs(z_NV[rows], other_NV[rows], own, others)
        weight_N1 = weight_N[rows, None]
        value, e, shared = terms(log_p, log_q, d, measure.kind, measure.skew, weight_N1)
        sums_6N[0, rows], sums_6N[1, rows] = value.sum(1), e.sum(1)
        if mirror is not None:
            sums_6N[2, rows] = gradients(log_q, log_p, -d, mirror, measure.skew, 1 - weight_N1)[0].sum(1)
        if measure.kind in MIXED:
            sums_6N[5, rows] = shared.sum(1)
        sums_6N[3, rows], sums_6N[4, rows] = log_p.exp_().sum(1), log_q.exp_().sum(1)
    return RowSums(*sums_6N.unbind())


def gradient(
    z_NV: Tensor,
    other_NV: Tensor,
    rows_N: GradientRows,
    measure: Measure,
    share_V: Tensor | None,
    dz_NV: Tensor,
) -> None:
    """Write dz of the model whose logits z_NV are to dz_NV, which may be z_NV.

    Args:
        z_NV: its logits, up to `measure.alpha`.
        other_NV: the other model's.
        rows_N: what each row needs.
        measure: kind and factors, seen from the model whose gradient this is.
        share_V: log of the part that this column has of an id that stands in several.
        dz_NV: where to write.
    """
    N, V = z_NV.shape
    if not (N and V):
        return
    if runs_triton(z_NV):
        rows_8N = torch.stack(rows_N)
        with on_device(z_NV):
            _gradient_kernel[(N, triton.cdiv(V, BLOCK_V))](
                z_NV, other_NV, rows_8N, share_V, dz_NV,
                z_NV.stride(0), other_NV.stride(0), dz_NV.stride(0), N, V,
                measure.alpha, measure.other_alpha, measure.skew, measure.cap,
                KIND=measure.kind, BLOCK_V=BLOCK_V,
            )  # fmt: skip
        return
    share_V = None if share_V is None else share_V.exp()
    for rows in logits.groups(z_NV):
        z, column = z_NV[rows], [x[rows, None] for x in rows_N]
        some = GradientRows(*column)
        lse = (some.top_N, some.lse_N), (some.other_top_N, some.other_lse_N)
        e, p = gradients(*logs(z, other_NV[rows], *lse), measure.kind, measure.skew, some.weight_N)
        if share_V is not None:
            e = e - p * (some.centre_N * share_V - some.kappa_N)
        else:
            e = e - p.mul_(some.centre_N)
        if measure.cap is not None:
            e.mul_(logits.slope(z, measure.cap))
        torch.mul(e, some.factor_N, out=dz_NV[rows])


def rest_gradient(
    z_NV: Tensor, lse_N2: Tensor, factor_N: Tensor, alpha: float, cap: float | None, dz_NV: Tensor
) -> None:
    """Write factor · exp(z − maximum − lse), times the softcap's slope, to dz_NV, which may be z_NV."""
    N, V = z_NV.shape
    if not (N and V):
        return
    if runs_triton(z_NV):
        with on_device(z_NV):
            _rest_gradient_kernel[(N, triton.cdiv(V, BLOCK_V))](
                z_NV, lse_N2, factor_N, dz_NV, z_NV.stride(0), dz_NV.stride(0), V, alpha, cap, BLOCK_V=BLOCK_V
            )  # fmt: skip
        return
    for rows in logits.groups(z_NV):
        z = z_NV[rows]
        top_N1, lse_N1 = lse_N2[rows].split(1, 1)
        dz = (z - top_N1).sub_(lse_N1).exp_().mul_(factor_N[rows, None])
        if cap is not None:
            dz.mul_(logits.slope(z, cap))
        dz_NV[rows] = dz
