"""The best experts of every head, found through keys that are sums of parts: product keys, arXiv:1907.05242.

An expert e = (i_1, …, i_L) has the key c_1[i_1] ⊕ … ⊕ c_L[i_L], so a query in L equal parts scores it

    S_e = Σ_l q_l · c_l[i_l]                 e = (i_1 E_2 + i_2) E_3 + … (row-major)

and the K best of Π E_l are found from Σ E_l products: one part at a time, the K best of the sums so far with
the K best of the next part. Of two sorted lists only pairs (i, j) with (i + 1)(j + 1) ≤ K can be among the K
best (the others have K better ones), 50 of 256 for K = 16. Then

    softmax   g = softmax over the K of a head       dS = g ⊙ (dg − Σ_K g dg)
    relu      g = max(S, 0)                          dS = dg [g > 0]
    sigmoid   g = 1 / (1 + e^−S)                     dS = dg g (1 − g)
    dq_l = Σ_K dS c_l[i_l]                           dc_l[i] = Σ_{(n,h,k): i_l = i} dS q_l

Which experts are taken has no gradient. Scores are float32 products of the operands as they are, held for a
few tokens at a time: [N, H, E_l] never exists. The keys' gradient is a sum in the order of the keys
(`table_rows.py`): no atomics.

Dimensions: N tokens, H heads, K picked per head, L parts, E_l keys of a part, Q width of a query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.kernels.head.tiles import chunks
from tokenkit.kernels.kinds import GATES
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, refuse_forward_mode, runs_triton
from tokenkit.kernels.table_rows import ordered, segment_sums, sum_dtype, weighted_rows

WORKSPACE_BYTES = 8 * 2**20
"""Scores of one part that torch's lines hold at a time."""


MOST_PICKS = {16: 32, 32: 16}
"""By bits of a number: a larger K takes torch's lines on a GPU too, its lists would not fit the registers."""


@triton.jit
def _packed(score, index):
    """Return integers in the order of scores, and of falling indices among equal ones; all above 0."""
    bits = score.to(tl.uint32, bitcast=True)
    rising = bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return (rising.to(tl.uint64) << 32) | (0xFFFFFFFF - index.to(tl.uint32)).to(tl.uint64)


@triton.jit
def _score_of(packed):
    rising = (packed >> 32).to(tl.uint32)
    bits = rising ^ tl.where((rising >> 31) != 0, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _index_of(packed):
    return 0xFFFFFFFF - (packed & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _best_of_part(
    query_ptr, key_ptr, offs_n, h, N, H, E, Q, width, at, STRIDE_H,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Return the K best keys of one part, packed, best first; 0 where there are fewer."""
    offs_q = tl.arange(0, BLOCK_Q)
    offs = (offs_n[:, None].to(tl.int64) * H + h) * width + at + offs_q[None, :]
    query = tl.load(query_ptr + offs, mask=(offs_n < N)[:, None] & (offs_q < Q)[None, :], other=0.0)
    best = tl.zeros((BLOCK_N, K), tl.uint64)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask = (offs_e < E)[:, None] & (offs_q < Q)[None, :]
        key = tl.load(key_ptr + h * STRIDE_H + offs_e[:, None] * Q + offs_q[None, :], mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(key), out_dtype=tl.float32, input_precision="ieee")
        packed = _packed(score, tl.broadcast_to(offs_e[None, :], (BLOCK_N, BLOCK_E)))
        found = tl.topk(tl.where((offs_e < E)[None, :], packed, 0), K)
        best = tl.maximum(tl.sort(best), found)  # rising against falling: the K best of both, in no order
    return tl.sort(best, descending=True)


@triton.jit
def _pick_kernel(
    query_ptr, key_ptr, first_ptr, second_ptr, score_ptr, expert_ptr,
    N, H, Q, picks,
    SIZES: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N tokens and head: part by part, the best of it and of the sums so far.

    Keys of all parts stand one after the other, [H or 1, E_l, Q] each.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1)
    offs_p = tl.arange(0, PAIRS)
    first = tl.broadcast_to(tl.load(first_ptr + offs_p)[None, :], (BLOCK_N, PAIRS))
    second = tl.broadcast_to(tl.load(second_ptr + offs_p)[None, :], (BLOCK_N, PAIRS))
    width = Q * len(SIZES)
    best = tl.zeros((BLOCK_N, K), tl.uint64)
    for part in tl.static_range(len(SIZES)):
        E = SIZES[part]
        stride = 0 if SHARED else E * Q
        found = _best_of_part(
            query_ptr, key_ptr, offs_n, h, N, H, E, Q, width, part * Q, stride, K, BLOCK_N, BLOCK_E, BLOCK_Q
        )  # fmt: skip
        key_ptr += E * Q * (1 if SHARED else H)
        if part == 0:
            best = found
        else:
            one = tl.gather(best, first, 1)
            two = tl.gather(found, second, 1)
            index = _index_of(one) * E + _index_of(two)
            packed = _packed(_score_of(one) + _score_of(two), index)
            stands = (one != 0) & (two != 0) & (offs_p < COUNT)[None, :]
            best = tl.topk(tl.where(stands, packed, 0), K)
    offs_k = tl.arange(0, K)
    mask = (offs_n < N)[:, None] & (offs_k < picks)[None, :]
    offs = (offs_n[:, None].to(tl.int64) * H + h) * picks + offs_k[None, :]
    tl.store(score_ptr + offs, _score_of(best), mask=mask)
    tl.store(expert_ptr + offs, _index_of(best).to(tl.int32), mask=mask)


def _pick_triton(query: Tensor, keys: Sequence[Tensor], K: int) -> tuple[Tensor, Tensor]:
    """`_pick_torch` in one launch."""
    N, H = query.shape[:2]
    score = query.new_empty((N, H, K), dtype=torch.float32)
    expert = query.new_empty((N, H, K), dtype=torch.int32)
    sizes = blocks(K, keys[0].shape[2], 8 * query.dtype.itemsize)
    rest = [0] * (sizes["PAIRS"] - sizes["COUNT"])
    first, second = (
        torch.tensor([*places, *rest], dtype=torch.int32, device=query.device)
        for places in staircase(sizes["K"])
    )
    together = torch.cat([key.flatten() for key in keys])
    with on_device(query):
        _pick_kernel[(triton.cdiv(N, sizes["BLOCK_N"]), H)](
            query, together, first, second, score, expert, N, H, keys[0].shape[2], K,
            SIZES=tuple(key.shape[1] for key in keys), SHARED=len(keys[0]) == 1, **sizes,
        )  # fmt: skip
    return score, expert


def blocks(K: int, Q: int, bits: int) -> dict[str, int]:
    """Return how `_pick_kernel` is compiled for K picks, parts of width Q and numbers of so many bits.

    A warp holds 16 whole rows where that does not spill.
    """
    size = triton.next_power_of_2(K)
    pairs = len(staircase(size)[0])
    warps = 4 if bits > 16 or size > 16 else 2
    return {
        "K": size, "PAIRS": triton.next_power_of_2(pairs), "COUNT": pairs,
        "BLOCK_N": 16 if bits > 16 else 32,
        "BLOCK_E": max(32, size), "BLOCK_Q": max(16, triton.next_power_of_2(Q)), "num_warps": warps,
    }  # fmt: skip


@lru_cache
def staircase(K: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the places (i, j) in two lists, largest first, whose sums can be among the K largest."""
    pairs = [(i, j) for i in range(K) for j in range(K) if (i + 1) * (j + 1) <= K]
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)


def _pick_torch(query: Tensor, keys: Sequence[Tensor], K: int) -> tuple[Tensor, Tensor]:
    """Return the K best scores and experts of every query, [N, H, K], largest first."""
    N, H = query.shape[:2]
    dtype = sum_dtype(query)
    score = query.new_empty((N, H, K), dtype=dtype)
    expert = query.new_empty((N, H, K), dtype=torch.int32)
    first, second = (torch.tensor(places, device=query.device) for places in staircase(K))
    wide = [key.to(dtype) for key in keys]
    for rows in chunks(N, H * max(len(key[0]) for key in keys) * dtype.itemsize, WORKSPACE_BYTES):
        best: tuple[Tensor, Tensor] | None = None
        for part, key in zip(query[rows].to(dtype).chunk(len(keys), -1), wide, strict=True):
            if len(key) == 1:
                all_scores = part @ key[0].T
            else:
                all_scores = torch.bmm(part.transpose(0, 1), key.mT).transpose(0, 1)
            found, at = all_scores.topk(K, -1)
            if best is None:
                best = found, at
                continue
            sums, place = (best[0][..., first] + found[..., second]).topk(K, -1)
            index = best[1][..., first] * key.shape[1] + at[..., second]
            best = sums, index.gather(-1, place)
        assert best is not None
        score[rows], expert[rows] = best
    return score, expert


def _gate_torch(score: Tensor, gate: str) -> Tensor:
    if gate == "softmax":
        return score.softmax(-1)
    return score.relu() if gate == "relu" else score.sigmoid()


@torch.library.custom_op("tokenkit::product_key_topk", mutates_args=())
def _topk(query: Tensor, keys: Sequence[Tensor], K: int, gate: str) -> tuple[Tensor, Tensor]:
    """Return experts and gates, [N, H, K]."""
    most = MOST_PICKS[8 * query.dtype.itemsize] if runs_triton(query) and len(query) else 0
    score, expert = (_pick_triton if most >= K else _pick_torch)(query, keys, K)
    return expert, _gate_torch(score, gate)


@_topk.register_fake
def _(query: Tensor, keys: Sequence[Tensor], K: int, gate: str) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], K)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=sum_dtype(query))


@torch.library.custom_op("tokenkit::product_key_backward", mutates_args=())
def _topk_backward(
    dscore: Tensor, query: Tensor, keys: Sequence[Tensor], expert: Tensor, needs_keys: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of query and keys; no keys' where nobody asks."""
    N, H, K = expert.shape
    dpart, dkeys, stride = [], [], 1
    dscore_RK = dscore.reshape(N * H, K)
    head_H1 = torch.arange(H, device=expert.device, dtype=expert.dtype)[:, None]
    parts = query.chunk(len(keys), -1)
    for part, key in reversed(list(zip(parts, keys, strict=True))):
        place = expert // stride % key.shape[1]
        if len(key) > 1:
            place = place + head_H1 * key.shape[1]
        stride *= key.shape[1]
        place_RK, table = place.reshape(N * H, K), key.flatten(0, 1)
        dpart.append(weighted_rows(table, place_RK, dscore_RK).unflatten(0, (N, H)))
        if needs_keys:
            rows_RQ = part.flatten(0, 1)
            sums = segment_sums(rows_RQ, dscore_RK, ordered(place_RK, len(table)), key.dtype)
            dkeys.append(sums.view(key.shape))
    return torch.cat(dpart[::-1], -1).to(query.dtype), dkeys[::-1]


@_topk_backward.register_fake
def _(
    dscore: Tensor, query: Tensor, keys: Sequence[Tensor], expert: Tensor, needs_keys: bool
) -> tuple[Tensor, list[Tensor]]:
    return query.new_empty(query.shape), [key.new_empty(key.shape) for key in keys] if needs_keys else []


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _, ctx.gate = inputs
    ctx.save_for_backward(query, *output, *keys)
    ctx.mark_non_differentiable(output[0])


@once_differentiable
def _differentiate(ctx: Any, _: Tensor, dgate: Tensor) -> tuple[Any, ...]:
    query, expert, gate, *keys = ctx.saved_tensors
    if ctx.gate == "softmax":
        pulled = gate * dgate
        dscore = pulled - gate * pulled.sum(-1, keepdim=True)
    elif ctx.gate == "relu":
        dscore = dgate.where(gate > 0, 0)
    else:
        dscore = dgate * gate * (1 - gate)
    needs_keys = any(ctx.needs_input_grad[1])
    dquery, dkeys = torch.ops.tokenkit.product_key_backward(dscore, query, keys, expert, needs_keys)
    return dquery, dkeys if needs_keys else [None] * len(keys), None, None


_topk.register_autograd(_differentiate, setup_context=_save)


def product_key_topk(
    query_NHQ: Tensor, keys: Sequence[Tensor], K: int, gate: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Return the K best experts of every head, and their gates. Differentiable in query and keys.

    Args:
        query_NHQ: queries, their parts one after the other.
        keys: of each part [H, E_l, Q / L], or [1, E_l, Q / L] where heads share them; the queries' dtype.
        K: experts per head, no more than any part has keys.
        gate: one of `GATES`.

    Returns:
        expert_NHK: int32 ids below Π E_l, best first; among equal scores any may come first, or be taken.
        gate_NHK: float32 (float64 of float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, K out of range, or an unknown gate.
    """
    refuse_forward_mode(query_NHQ, *keys)
    _check(query_NHQ, keys, K, gate)
    expert_NHK, gate_NHK = _topk(query_NHQ.contiguous(), [key.contiguous() for key in keys], K, gate)
    return expert_NHK, gate_NHK


def count_usage(expert_NP: Tensor, gate_NP: Tensor, count_E: Tensor, mass_E: Tensor) -> None:
    """Add to each expert how often it was taken, and the sum of its gates, where the tensors are.

    Nothing waits for the device. Both are integers, so the order of tokens does not show.

    Args:
        expert_NP: ids, any shape.
        gate_NP: their gates, the same shape, below 2^15.
        count_E: int64, added to.
        mass_E: int64 in units of 2^-24, added to.
    """
    flat = expert_NP.flatten().long()
    count_E.index_add_(0, flat, torch.ones_like(flat))
    mass_E.index_add_(0, flat, (gate_NP.detach().flatten().double() * MASS_UNITS).round().long())


MASS_UNITS = 2.0**24
"""Of one gate, in the sums of `count_usage`."""


def _check(query: Tensor, keys: Sequence[Tensor], K: int, gate: str) -> None:
    if gate not in GATES:
        raise ValueError(f"unknown gate {gate!r}: expected one of {', '.join(GATES)}")
    shapes = [tuple(key.shape) for key in keys]
    fits = query.ndim == 3 and keys and all(
        len(shape) == 3 and shape[0] in (1, query.shape[1]) and shape[2] * len(keys) == query.shape[2]
        for shape in shapes
    )  # fmt: skip
    if not fits:
        raise ValueError(
            "expected a query [N, H, Q] and L keys [H or 1, E_l, Q / L]: got "
            f"{tuple(query.shape)} and {', '.join(map(str, shapes)) or 'no keys'}"
        )
    if not 1 <= K <= min(shape[1] for shape in shapes):
        raise ValueError(f"K must be between 1 and the fewest keys of a part: got {K} of {shapes}")
    if math.prod([shape[1] for shape in shapes]) >= 2**31:
        raise ValueError(f"there may be at most 2^31 - 1 experts: the keys make more, {shapes}")
    if not query.is_floating_point() or any(key.dtype != query.dtype for key in keys):
        raise ValueError(
            f"query and keys must be of one floating dtype: got {query.dtype} and "
            f"{', '.join(str(key.dtype) for key in keys)}"
        )
    if any(key.device != query.device for key in keys):
        raise ValueError(f"the query is on {query.device}: the keys must be there too")
