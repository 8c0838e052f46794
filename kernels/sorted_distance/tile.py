"""What `sorted_distance` does with rows of logits: Triton epilogues, and the same lines of torch.

    histogram        z -> how many probabilities each bin holds, and how far above its lower edge they lie
    merge            two histograms -> the distance, the sign of each bin, and the mean sign under p
    dlogits          z -> the gradient of z

Bins follow the bits of a float: with u = p + foot, the bits of u less those of foot grow with p, are linear
in p between two edges, and their upper bits number the bins. foot = 2⁻²⁴ times a power of two that bounds
every probability of the row, so an octave is a step of 2²³; the lower 16 octaves hold 64 bins each, the
upper 8 hold 256 (their bits are counted four times), and what lies far below foot shares the first bin.
A count and the sum of the lower bits fit one integer, and sums of integers have no order: no result
depends on which program came first.

Dimensions: N rows, V the logits of a row, B bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head.logits import slope, slope_triton
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton

OCTAVE = 23  # log2 of the step of a float32's bits from one power of two to the next
COARSE_OCTAVES, FINE_OCTAVES = 16, 8
FRACTION = 17  # lower bits of a code: the place inside a bin; 2^(23 − 17) = 64 bins in a coarse octave
BINS = COARSE_OCTAVES + 4 * FINE_OCTAVES << OCTAVE - FRACTION  # 3072
COUNT = 40  # a packed number is count · 2^40 + Σ fraction; 2^18 ids · 2^17 stay far below 2^39
FINE_FRACTION = 40  # float64: fractions in steps of 2^-40 of a bin, in a plane of their own

BLOCK_V = 4096  # logits of one step of a program
HISTOGRAM_BLOCK_V = 2048  # in pairs of a bin and an int64, more would not fit the registers
BLOCK_B = 4096  # a power of two that holds every bin
MERGE_WARPS = 16
PIECE = 1 << 17  # numbers that a CPU turns at once: fewer, and the calls weigh more than the arithmetic
MERGE_ROWS = 16  # histograms that a CPU merges at once, for the same reason

_FINE_FROM = tl.constexpr(COARSE_OCTAVES << OCTAVE)
_FRACTION = tl.constexpr(FRACTION)
_COUNT = tl.constexpr(COUNT)
_ONE_COUNT = tl.constexpr(1 << COUNT)
_HALF_COUNT = tl.constexpr(1 << COUNT - 1)
_ONE_BIN = tl.constexpr(1 << FRACTION)
_LAST = tl.constexpr((BINS << FRACTION) - 1)


class Softmax(NamedTuple):
    """What makes probabilities of a row's logits: p = exp(z − max) · inverse.

    Nearer the truth than exp(z − lse), which rounds at the size of the log-sum-exp.
    """

    max_N: Tensor
    inverse_N: Tensor
    """1 / Σ exp(z − max): also the largest p."""


class RowFactors(NamedTuple):
    """What `dlogits` must know of each row."""

    max_N: Tensor
    inverse_N: Tensor
    foot_N: Tensor
    """float32, from `foot`."""
    mean_N: Tensor
    """Σ p · sign over the row."""
    factor_N: Tensor
    """What the row's gradient is multiplied by, the slope of the products included."""


@triton.jit
def _code(p, foot):
    """Number a probability: bin · 2^FRACTION + fraction."""
    code = (p + foot).to(tl.int32, bitcast=True) - foot.to(tl.int32, bitcast=True)
    # p at the bound itself belongs to the last bin; of a NaN the code may be anything, and must be a bin
    return tl.maximum(tl.minimum(code + 3 * tl.maximum(code - _FINE_FROM, 0), _LAST), 0)


@triton.jit
def _edge(bins, foot):
    """Return the lower edge of a bin, foot included: `_code` backwards."""
    code = bins << _FRACTION
    code = tl.where(code < _FINE_FROM, code, _FINE_FROM + ((code - _FINE_FROM) >> 2))
    return (code + foot.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _histogram_kernel(
    z_ptr, max_ptr, inverse_ptr, foot_ptr, bins_ptr,
    stride, V, BINS,
    alpha,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and stretch of V: add its probabilities to the row's bins."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 128k
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0) * alpha
    z = tl.where(mask, z, float("-inf"))
    p = tl.exp(z - tl.load(max_ptr + n)) * tl.load(inverse_ptr + n)
    code = _code(p, tl.load(foot_ptr + n))
    bins = code >> _FRACTION
    one = (code & (_ONE_BIN - 1)).to(tl.int64) + _ONE_COUNT
    # in a peaked row nearly all ids share the first bin: thousands of atomics on one address
    first = tl.sum(tl.where(mask & (bins == 0), one, 0), axis=0)
    tl.atomic_add(bins_ptr + n * BINS, first, sem="relaxed")
    tl.atomic_add(bins_ptr + n * BINS + bins, one, mask=mask & (bins > 0), sem="relaxed")


@triton.jit
def _merge_kernel(
    own_ptr, difference_ptr, foot_ptr, value_ptr, sign_ptr, mean_ptr,
    BINS,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program per row: the distance, the sign of each bin, and the mean of the signs under p."""
    n = tl.program_id(0).to(tl.int64)
    offs_b = tl.arange(0, BLOCK_B)
    mask = offs_b < BINS
    foot = tl.load(foot_ptr + n)
    edge = _edge(offs_b, foot)
    width = _edge(offs_b + 1, foot) - edge

    packed = tl.load(difference_ptr + n * BINS + offs_b, mask=mask, other=0)
    fraction = ((packed + _HALF_COUNT) & (_ONE_COUNT - 1)) - _HALF_COUNT
    count = ((packed - fraction) >> _COUNT).to(tl.int32)
    above = tl.cumsum(count, axis=0, reverse=True) - count
    # half a step more for each: a probability on an edge counts as just above it, so it has a sign
    excess = above.to(tl.float32) + (fraction.to(tl.float32) + 0.5 * count.to(tl.float32)) / _ONE_BIN
    sign = tl.where(excess > 0, 1.0, 0.0) - tl.where(excess < 0, 1.0, 0.0)
    tl.store(value_ptr + n, tl.sum(tl.where(mask, tl.abs(excess) * width, 0.0), axis=0))
    tl.store(sign_ptr + n * BINS + offs_b, sign.to(tl.int8), mask=mask)

    packed = tl.load(own_ptr + n * BINS + offs_b, mask=mask, other=0)
    count = (packed >> _COUNT).to(tl.float32)
    fraction = ((packed & (_ONE_COUNT - 1)).to(tl.float32) + 0.5 * count) / _ONE_BIN
    mass = count * (edge - foot) + fraction * width
    tl.store(mean_ptr + n, tl.sum(tl.where(mask, sign * mass, 0.0), axis=0))


@triton.jit
def _dlogits_kernel(
    z_ptr, max_ptr, inverse_ptr, foot_ptr, mean_ptr, factor_ptr, sign_ptr, dz_ptr,
    stride, dz_stride, V, BINS,
    alpha, cap,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and stretch of V: p (sign − mean) times the row's factor and the cap's slope."""
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0) * alpha
    p = tl.exp(z - tl.load(max_ptr + n)) * tl.load(inverse_ptr + n)
    bins = _code(p, tl.load(foot_ptr + n)) >> _FRACTION
    sign = tl.load(sign_ptr + n * BINS + bins, mask=mask, other=0).to(tl.float32)
    dz = p * (sign - tl.load(mean_ptr + n)) * tl.load(factor_ptr + n) * slope_triton(z, cap)
    tl.store(dz_ptr + n * dz_stride + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def foot(largest_N: Tensor) -> Tensor:
    """Return 2⁻²⁴ of the power of two at or above the largest probability of each row, float32."""
    bits_N = largest_N.float().view(torch.int32)
    exponent_N = (bits_N + (1 << OCTAVE) - 1) >> OCTAVE  # rounded up: the mantissa's bits carry
    return (exponent_N - (COARSE_OCTAVES + FINE_OCTAVES) << OCTAVE).view(torch.float32)


def histogram(z_NV: Tensor, softmax: Softmax, foot_N: Tensor, alpha: float = 1.0) -> Tensor:
    """Return [planes, N, BINS] int64; sums and differences of such tensors are those of what they count.

    float32 has one plane, count · 2^COUNT + Σ fraction in steps of 2^-FRACTION of a bin; float64 has the
    count, and Σ fraction in steps of 2^-FINE_FRACTION. `alpha`: what is left to multiply z_NV with.
    """
    N, V = z_NV.shape
    bins = torch.zeros((_planes(z_NV), N, BINS), dtype=torch.int64, device=z_NV.device)
    if not z_NV.numel():
        return bins
    if runs_triton(z_NV):
        with on_device(z_NV):
            grid = (N, triton.cdiv(V, HISTOGRAM_BLOCK_V))
            _histogram_kernel[grid](
                z_NV, *softmax, foot_N, bins, z_NV.stride(0), V, BINS, alpha, BLOCK_V=HISTOGRAM_BLOCK_V
            )
        return bins
    work = _Work(z_NV)
    for rows in work.rows():
        into = [plane[rows].view(-1) for plane in bins]
        for columns in work.columns():
            p_NV = work.probabilities(z_NV[rows, columns], softmax, rows)
            code_NV = work.codes(p_NV, foot_N[rows])
            bin_NV = torch.bitwise_right_shift(code_NV, FRACTION, out=work.spare_NV).add_(work.offset_N1)
            if len(bins) == 2:
                edge_NV, width_NV = (x.take(bin_NV.long()) for x in edges(foot_N[rows], p_NV.dtype))
                fraction_NV = (p_NV + foot_N[rows, None] - edge_NV) / width_NV
                steps_NV = (fraction_NV * 2.0**FINE_FRACTION).round().long()
                into[1].index_add_(0, bin_NV.view(-1), steps_NV.view(-1))
                work.packed_NV.fill_(1)
            else:
                work.packed_NV.copy_(code_NV.bitwise_and_((1 << FRACTION) - 1)).add_(1 << COUNT)
            into[0].index_add_(0, bin_NV.view(-1), work.packed_NV.view(-1))
    return bins


def merge(own: Tensor, difference: Tensor, foot_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return value_N, sign_NB (int8) and mean_N, the part of Σ p · sign that `own` holds.

    Args:
        own: histogram of the student's probabilities that are here.
        difference: histogram of the student's less the teacher's, over all ranks.
        foot_N: of both.
        dtype: float32 or float64.
    """
    N = len(foot_N)
    value_N, mean_N = (torch.empty(N, dtype=dtype, device=foot_N.device) for _ in range(2))
    sign_NB = torch.empty((N, BINS), dtype=torch.int8, device=foot_N.device)
    if not N:
        return value_N, sign_NB, mean_N
    if runs_triton(value_N):
        with on_device(value_N):
            _merge_kernel[(N,)](
                own,
                difference,
                foot_N,
                value_N,
                sign_NB,
                mean_N,
                BINS,
                BLOCK_B=BLOCK_B,
                num_warps=MERGE_WARPS,
            )
        return value_N, sign_NB, mean_N
    for start in range(0, N, MERGE_ROWS):
        rows = slice(start, min(start + MERGE_ROWS, N))
        edge_NB, width_NB = edges(foot_N[rows], dtype)
        count_NB, excess_NB = _unpack(difference[:, rows], dtype)
        above_NB = count_NB.sum(1, keepdim=True) - count_NB.cumsum(1)
        excess_NB = excess_NB.add_(above_NB)
        sign = torch.sign(excess_NB)
        sign_NB[rows] = sign
        torch.sum(excess_NB.abs_().mul_(width_NB), 1, out=value_N[rows])
        count_NB, fraction_NB = _unpack(own[:, rows], dtype)
        mass_NB = fraction_NB.mul_(width_NB).add_(edge_NB.sub_(foot_N[rows, None]).mul_(count_NB))
        torch.sum(mass_NB.mul_(sign), 1, out=mean_N[rows])
    return value_N, sign_NB, mean_N


def bound(own: Tensor, theirs: Tensor, foot_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Return by how much the distance that `merge` makes of own − theirs may be too small, per row."""
    _, width_NB = edges(foot_N, dtype)
    (own_NB, excess_NB), (theirs_NB, theirs_excess_NB) = (_unpack(x, dtype) for x in (own, theirs))
    count_NB = own_NB - theirs_NB
    above_NB = count_NB.sum(1, keepdim=True) - count_NB.cumsum(1)
    excess_NB = above_NB + (excess_NB - theirs_excess_NB)
    most_NB = (above_NB + own_NB).clamp_min(0).to(dtype)
    least_NB = (theirs_NB - above_NB).clamp_min(0).to(dtype)
    known_NB = excess_NB.abs() * torch.where(excess_NB > 0, least_NB, most_NB)
    hidden_NB = (most_NB * least_NB - known_NB).clamp_min(0) / (most_NB + least_NB).clamp_min(1)
    alone_NB = (above_NB == 0) & (own_NB <= 1) & (theirs_NB <= 1)  # whichever is larger, D has one sign
    return 2 * (hidden_NB * width_NB).masked_fill(alone_NB, 0).sum(1)


def dlogits(
    z_NV: Tensor,
    row: RowFactors,
    sign_NB: Tensor,
    cap: float | None,
    dz_NV: Tensor,
    alpha: float = 1.0,
) -> None:
    """Write p (sign − mean) factor (1 − (z / cap)²) to dz_NV, which may be z_NV.

    Args:
        z_NV: logits, up to `alpha`.
        row: numbers of each row.
        sign_NB: of each bin.
        cap: softcap over temperature.
        dz_NV: where to write.
        alpha: what is left to multiply z_NV with.
    """
    N, V = z_NV.shape
    if not z_NV.numel():
        return
    if runs_triton(z_NV):
        with on_device(z_NV):
            _dlogits_kernel[(N, triton.cdiv(V, BLOCK_V))](
                z_NV, *row, sign_NB, dz_NV, z_NV.stride(0), dz_NV.stride(0), V, BINS, alpha, cap,
                BLOCK_V=BLOCK_V,
            )  # fmt: skip
        return
    work = _Work(z_NV)
    softmax = Softmax(row.max_N, row.inverse_N)
    for rows in work.rows():
        table_NB = (sign_NB[rows].to(z_NV.dtype) - row.mean_N[rows, None]).mul_(row.factor_N[rows, None])
        for columns in work.columns():
            z = z_NV[rows, columns]
            p_NV = work.probabilities(z, softmax, rows)
            bin_NV = work.codes(p_NV, row.foot_N[rows]).bitwise_right_shift_(FRACTION).add_(work.offset_N1)
            torch.index_select(table_NB.view(-1), 0, bin_NV.view(-1), out=work.other_NV.view(-1))
            p_NV.mul_(work.other_NV)
            if cap is not None:
                p_NV.mul_(slope(z, cap, out=work.other_NV))
            dz_NV[rows, columns] = p_NV


def edges(foot_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the lower edge of each bin, foot included, and its width, [N, BINS]."""
    code_B = torch.arange(BINS + 1, dtype=torch.int32, device=foot_N.device) << FRACTION
    fine_B = code_B - (COARSE_OCTAVES << OCTAVE)
    code_B = torch.where(fine_B < 0, code_B, code_B - fine_B + (fine_B >> 2))
    edge_NB = (foot_N.view(torch.int32)[:, None] + code_B).view(torch.float32).to(dtype)
    return edge_NB[:, :-1].contiguous(), edge_NB.diff(dim=1)


def _unpack(bins: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return count (int64) and Σ fraction (in bins, of `dtype`) of a histogram.

    Half a step more for each: a probability on an edge counts as just above it, so its bin has a sign.
    """
    if len(bins) == 2:
        return bins[0], (bins[1].to(dtype) + 0.5 * bins[0]) * 2.0**-FINE_FRACTION
    half = 1 << COUNT - 1
    count_NB = (bins[0] + half) >> COUNT
    fraction_NB = (bins[0] - (count_NB << COUNT)).to(dtype)
    return count_NB, fraction_NB.add_(count_NB, alpha=0.5).mul_(2.0**-FRACTION)


def _planes(z_NV: Tensor) -> int:
    return 2 if z_NV.dtype == torch.float64 else 1


class _Work:
    """How a CPU goes through z: whole rows while they fit a piece, else stretches of one row.

    Buffers of a piece are reused, because fresh memory costs a CPU more than the arithmetic. `rows` and
    `columns` make the views that fit what they yield.
    """

    def __init__(self, z_NV: Tensor) -> None:
        self.N, self.V = z_NV.shape
        self.step_N, self.step_V = min(max(PIECE // self.V, 1), self.N), min(PIECE, self.V)
        self.buffers = [
            torch.empty(self.step_N * self.step_V, dtype=dtype, device=z_NV.device)
            for dtype in (z_NV.dtype, z_NV.dtype, torch.int32, torch.int32, torch.int64)
        ]
        self.offsets_N1 = torch.arange(self.step_N, dtype=torch.int32, device=z_NV.device)[:, None] * BINS

    def rows(self) -> Iterator[slice]:
        for start in range(0, self.N, self.step_N):
            rows = slice(start, min(start + self.step_N, self.N))
            self.count = rows.stop - rows.start
            self.offset_N1 = self.offsets_N1[: self.count]
            yield rows

    def columns(self) -> Iterator[slice]:
        for start in range(0, self.V, self.step_V):
            columns = slice(start, min(start + self.step_V, self.V))
            shape = self.count, columns.stop - columns.start
            views = (buffer[: shape[0] * shape[1]].view(shape) for buffer in self.buffers)
            self.float_NV, self.other_NV, self.code_NV, self.spare_NV, self.packed_NV = views
            yield columns

    def probabilities(self, z_NV: Tensor, softmax: Softmax, rows: slice) -> Tensor:
        """Write p to `float_NV`."""
        torch.sub(z_NV, softmax.max_N[rows, None], out=self.float_NV)
        return self.float_NV.exp_().mul_(softmax.inverse_N[rows, None])

    def codes(self, p_NV: Tensor, foot_N: Tensor) -> Tensor:
        """Write bin · 2^FRACTION + fraction to `code_NV`, int32; `spare_NV` is overwritten."""
        above_NV = torch.add(p_NV, foot_N[:, None], out=self.code_NV.view(torch.float32))
        if p_NV.dtype == torch.float64:  # rounded up it could pass an edge that it does not reach
            self.code_NV.sub_((above_NV > p_NV + foot_N[:, None]).int())
        self.code_NV.sub_(foot_N.view(torch.int32)[:, None])
        fine_NV = torch.sub(self.code_NV, COARSE_OCTAVES << OCTAVE, out=self.spare_NV).clamp_min_(0)
        self.code_NV.add_(fine_NV, alpha=3)
        return self.code_NV.clamp_max_((BINS << FRACTION) - 1)  # p at the bound itself: the last bin
