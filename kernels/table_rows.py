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


class Pairs(NamedTuple):
    """All (token, row) pairs, ordered by their keys, in the order of tokens among equal ones."""

    order_P: Tensor
    """int64 place of each pair in the flattened [N, R]."""
    start_E: Tensor
    """int64 [E + 1], where each key's pairs begin; the last: how many pairs there are."""


def ordered(key_NR: Tensor, E: int) -> Pairs:
    """Order the pairs by key, without waiting for the device."""
    key_P, order_P = key_NR.flatten().sort(stable=True)
    bound_E = torch.arange(E + 1, device=key_P.device, dtype=key_P.dtype)
    return Pairs(order_P, torch.searchsorted(key_P, bound_E))


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
    hidden_ND = hidden_ND.to(sum_dtype(hidden_ND))
    weight_P = weight_NR.to(hidden_ND.dtype).flatten()[pairs.order_P]
    token_P = pairs.order_P // max(weight_NR.shape[1], 1)
    if not len(token_P):
        return hidden_ND.new_zeros((len(pairs.start_E) - 1, hidden_ND.shape[1]), dtype=dtype)
    return torch.nn.functional.embedding_bag(
        token_P, hidden_ND, pairs.start_E, per_sample_weights=weight_P, mode="sum", include_last_offset=True
    ).to(dtype)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return what sums over `tensor` are held in: float32, or float64 of float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
