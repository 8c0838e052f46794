"""A few rows of a table per token, as sums and products that never hold the rows themselves.

    row_dots       dot_nr = hidden_n · table[row_nr]                   gather, dot
    weighted_rows  sum_n  = Σ_r weight_nr table[row_nr]                gather, scale, accumulate
    segment_sums   sum_e  = Σ_{(n,r): key_nr = e} weight_nr hidden_n   the transpose: a table's gradient

An eager gather writes N·R·D numbers and keeps them for the backward. Here every row is read where it is
used. The transpose visits the pairs in the order of their keys, each key's by one owner, so there are no
atomics and sums repeat bit for bit; a sort of N·R integers pays for that.

Dimensions: N tokens, R rows of a token, E rows of the table, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton

BLOCK_D = 1024  # columns of one program, at most
BLOCK_P = 4  # pairs that a program reads at once
STRETCH = 512
"""Pairs of one key that one program adds up; what has more is added up in stretches, then joined."""


class Pairs(NamedTuple):
    """All (token, row) pairs, ordered by their keys, in the order of tokens among equal ones."""

    key_P: Tensor
    """The keys, rising."""
    order_P: Tensor
    """int64 place of each pair in the flattened [N, R]."""
    start_E: Tensor
    """int64 [E + 1], where each key's pairs begin; the last: how many pairs there are."""


def ordered(key_NR: Tensor, E: int) -> Pairs:
    """Order the pairs by key, without waiting for the device."""
    key_P, order_P = key_NR.flatten().sort(stable=True)
    bound_E = torch.arange(E + 1, device=key_P.device, dtype=key_P.dtype)
    return Pairs(key_P, order_P, torch.searchsorted(key_P, bound_E))


@triton.jit
def _weighted_rows_kernel(
    table_ptr, row_ptr, weight_ptr, out_ptr,
    R, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per token and block of columns: Σ weight · row."""
    n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        row = tl.load(row_ptr + n * R + offs_r, mask=mask_r, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + n * R + offs_r, mask=mask_r, other=0.0)
        mask = mask_r[:, None] & mask_d[None, :]
        value = tl.load(table_ptr + row[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        total += weight[:, None] * value.to(tl.float32)
    tl.store(out_ptr + n * D + offs_d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _sum_pairs(
    hidden_ptr, weight_ptr, order_ptr, first, last, R, D, offs_d,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return Σ weight · hidden over the ordered pairs from first to last, [BLOCK_D]."""
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < last
        pair = tl.load(order_ptr + offs_p, mask=mask_p, other=0)
        weight = tl.load(weight_ptr + pair, mask=mask_p, other=0.0)
        mask = mask_p[:, None] & (offs_d < D)[None, :]
        value = tl.load(hidden_ptr + (pair // R)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        total += weight[:, None] * value.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _segment_kernel(
    hidden_ptr, weight_ptr, order_ptr, start_ptr, out_ptr,
    R, D,
    STRETCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per key and block of columns: the sum of its pairs, unless they are too many; 0 of none."""
    e = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(start_ptr + e)
    last = tl.load(start_ptr + e + 1)
    if last - first <= STRETCH:
        total = _sum_pairs(
            hidden_ptr, weight_ptr, order_ptr, first, last, R, D, offs_d, BLOCK_P, BLOCK_D
        )  # fmt: skip
        tl.store(out_ptr + e * D + offs_d, total.to(out_ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit
def _stretch_kernel(
    hidden_ptr, weight_ptr, key_ptr, order_ptr, start_ptr, part_ptr,
    count, R, D,
    STRETCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per STRETCH pairs: sums over those of keys that have too many.

    Such a key holds the beginning of a stretch, its end, or both, so there are at most two.
    """
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = b * STRETCH
    high = tl.minimum(low + STRETCH, count)
    key = tl.load(key_ptr + low)
    after = tl.load(start_ptr + key + 1)
    if after - tl.load(start_ptr + key) > STRETCH:
        end = tl.minimum(high, after)
        total = _sum_pairs(hidden_ptr, weight_ptr, order_ptr, low, end, R, D, offs_d, BLOCK_P, BLOCK_D)
        tl.store(part_ptr + 2 * b * D + offs_d, total, mask=offs_d < D)
    other = tl.load(key_ptr + high - 1)
    begin = tl.load(start_ptr + other)
    if (begin > low) & (tl.load(start_ptr + other + 1) - begin > STRETCH):
        total = _sum_pairs(hidden_ptr, weight_ptr, order_ptr, begin, high, R, D, offs_d, BLOCK_P, BLOCK_D)
        tl.store(part_ptr + (2 * b + 1) * D + offs_d, total, mask=offs_d < D)


@triton.jit
def _join_kernel(
    key_ptr, start_ptr, part_ptr, out_ptr,
    count, D,
    STRETCH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per stretch: where a key of too many pairs begins in it, add up its parts."""
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    low = b * STRETCH
    key = tl.load(key_ptr + tl.minimum(low + STRETCH, count) - 1).to(tl.int64)
    begin = tl.load(start_ptr + key)
    end = tl.load(start_ptr + key + 1)
    if (end - begin > STRETCH) & (begin >= low):
        slot = tl.where(begin > low, 2 * b + 1, 2 * b)
        total = tl.load(part_ptr + slot * D + offs_d, mask=mask, other=0.0)
        for other in range(b + 1, (end - 1) // STRETCH + 1):
            total += tl.load(part_ptr + 2 * other * D + offs_d, mask=mask, other=0.0)
        tl.store(out_ptr + key * D + offs_d, total.to(out_ptr.dtype.element_ty), mask=mask)


def row_dots(hidden_ND: Tensor, table_ED: Tensor, row_NR: Tensor) -> Tensor:
    """Return the product of each token with each of its rows, [N, R], in the dtype of sums."""
    N, R = row_NR.shape
    token_P = torch.arange(N, device=row_NR.device, dtype=row_NR.dtype)
    dot_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        hidden_ND.to(table_ED.dtype).contiguous(), table_ED, row_NR.flatten(), token_P * R,
        token_P.repeat_interleave(R), 0,
    )  # fmt: skip
    return dot_P.view(N, R).to(sum_dtype(table_ED))


def weighted_rows(table_ED: Tensor, row_NR: Tensor, weight_NR: Tensor) -> Tensor:
    """Return the weighted sum of each token's rows, [N, D], in the table's dtype."""
    if runs_triton(table_ED) and row_NR.numel():
        (N, R), D = row_NR.shape, table_ED.shape[1]
        out_ND = table_ED.new_empty((N, D))
        columns = block_of(D)
        with on_device(table_ED):
            _weighted_rows_kernel[(N, triton.cdiv(D, columns))](
                table_ED, row_NR.contiguous(), weight_NR.contiguous(), out_ND, R, D,
                BLOCK_R=BLOCK_P, BLOCK_D=columns, num_warps=warps_of(columns),
            )  # fmt: skip
        return out_ND
    return torch.nn.functional.embedding_bag(
        row_NR, table_ED, per_sample_weights=weight_NR.to(table_ED.dtype), mode="sum"
    )


def segment_sums(hidden_ND: Tensor, weight_NR: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Return for each key the weighted sum of the tokens that have it, [E, D], 0 where none has.

    Args:
        hidden_ND: what is summed.
        weight_NR: one factor per pair.
        pairs: of `ordered`, for the same N and R.
        dtype: of the result; sums are float32 (float64 of float64).
    """
    if runs_triton(hidden_ND) and weight_NR.numel():
        return _segment_sums_triton(hidden_ND.contiguous(), weight_NR.contiguous(), pairs, dtype)
    hidden_ND = hidden_ND.to(sum_dtype(hidden_ND))
    weight_P = weight_NR.to(hidden_ND.dtype).flatten()[pairs.order_P]
    token_P = pairs.order_P // max(weight_NR.shape[1], 1)
    if not len(token_P):
        return hidden_ND.new_zeros((len(pairs.start_E) - 1, hidden_ND.shape[1]), dtype=dtype)
    return torch.nn.functional.embedding_bag(
        token_P, hidden_ND, pairs.start_E, per_sample_weights=weight_P, mode="sum", include_last_offset=True
    ).to(dtype)


def _segment_sums_triton(hidden_ND: Tensor, weight_NR: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """`segment_sums` by the kernels above, without waiting for the device."""
    E, D, R = len(pairs.start_E) - 1, hidden_ND.shape[1], weight_NR.shape[1]
    columns, count = block_of(D), weight_NR.numel()
    blocks, sizes = triton.cdiv(D, columns), {"BLOCK_D": columns, "num_warps": warps_of(columns)}
    out_ED = hidden_ND.new_empty((E, D), dtype=dtype)
    with on_device(hidden_ND):
        _segment_kernel[(E, blocks)](
            hidden_ND, weight_NR, pairs.order_P, pairs.start_E, out_ED, R, D,
            STRETCH=STRETCH, BLOCK_P=BLOCK_P, **sizes,
        )  # fmt: skip
        if count > STRETCH:
            stretches = triton.cdiv(count, STRETCH)
            part_SD = hidden_ND.new_empty((2 * stretches, D), dtype=torch.float32)
            _stretch_kernel[(stretches, blocks)](
                hidden_ND, weight_NR, pairs.key_P, pairs.order_P, pairs.start_E, part_SD, count, R, D,
                STRETCH=STRETCH, BLOCK_P=BLOCK_P, **sizes,
            )  # fmt: skip
            _join_kernel[(stretches, blocks)](
                pairs.key_P, pairs.start_E, part_SD, out_ED, count, D, STRETCH=STRETCH, **sizes
            )
    return out_ED


def block_of(D: int) -> int:
    """Return how many columns one program holds."""
    return min(triton.next_power_of_2(D), BLOCK_D)


def warps_of(columns: int) -> int:
    """Return the warps of a program with BLOCK_P rows of so many columns: 8 columns of each to a thread."""
    return max(columns // 256, 1)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return what sums over `tensor` are held in: float32, or float64 of float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
