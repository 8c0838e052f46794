"""The sort of `sorted_distance` and `hybrid_distance`, with `exact`; the other way are the bins.

A CPU sorts a few rows at a time, while they are in its caches, with NumPy, whose vectorised sort of float32
takes a fifteenth of torch's time (torch always sorts an index along). Where the gradient must find its way
back, the bits of a probability and its id make one int64: positive floats are ordered as their bits are.

Dimensions: N rows, V student and W teacher vocabulary.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor

from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.sorted_distance import tile
from tokenkit.structs import Head

SORTED_VOCAB = 8192  # of the larger model: with few ids the bins are at their worst, and a sort is cheap
PIECE_BYTES = 32  # of a number in a piece: key and what torch makes on the way
_HAS_NUMPY = find_spec("numpy") is not None  # torch does without
_HIGH = int(sys.byteorder == "little")  # which half of an int64 decides its order


def sorts(exact: bool | None, heads: tuple[Head, Head], keeps_tables: bool) -> bool:
    """Say whether to sort; None: where that is cheap, and both heads are whole.

    Args:
        exact: what the caller says.
        heads: the student's and the teacher's.
        keeps_tables: whether bins would do without a second dW that a sort needs.
    """
    if exact is not None:
        return exact
    if any(head.shard is not None for head in heads):
        return False
    if max(vocab_size(head) for head in heads) <= SORTED_VOCAB:
        return True
    return heads[0].weight_VD.device.type == "cpu" and not keeps_tables


def sort_memory(device: torch.device, V: int, W: int) -> tuple[int, int]:
    """Return the bytes that a sort of float32 takes for each row, and for all."""
    if device.type != "cpu":  # values and int64 indices, which the sort copies, and differences
        return 24 * (V + W) + 8 * V, 0
    return 0, PIECE_BYTES * max(tile.PIECE * torch.get_num_threads(), V, W)


def compare_sorted(
    z: tuple[Tensor, Tensor],
    softmax: tuple[tile.Softmax, tile.Softmax],
    value_N: Tensor,
    pull_NV: Tensor | None,
    centred: bool = False,
) -> None:
    """Write Σ |p_(r) − q_(r)| of each row to value_N, and p G or p (G − Σ p G) to pull_NV. Ties pull nothing.

    Args:
        z: logits of the student [N, V] and of the teacher [N, W]; the latter are overwritten.
        softmax: of both.
        value_N: of the dtype of z.
        pull_NV: may be the student's z; None: no gradient is wanted.
        centred: p (G − Σ p G) instead of p G.
    """
    z_NV, z_NW = z
    N, longest = len(z_NV), max(z_NV.shape[1], z_NW.shape[1], 1)
    step = N if z_NV.device.type != "cpu" else max(tile.PIECE // longest, 1) * torch.get_num_threads()
    for start in range(0, N, max(step, 1)):
        rows = slice(start, min(start + step, N))
        p_NV, q_NW = (
            torch.sub(x[rows], one.max_N[rows, None], out=room).exp_().mul_(one.inverse_N[rows, None])
            for x, one, room in zip(z, softmax, (torch.empty_like(z_NV[rows]), z_NW[rows]), strict=True)
        )
        q_NW = _sorted(q_NW)
        if pull_NV is None:
            _distance(_sorted(p_NV), q_NW, value_N[rows])
            continue
        p_NV, order_NV = _sorted_with_ids(p_NV)
        sign_NV = _distance(p_NV.clone(), q_NW, value_N[rows]).sign_()
        if centred:
            sign_NV -= (p_NV * sign_NV).sum(1, keepdim=True)
        pull_NV[rows].scatter_(1, order_NV, p_NV.mul_(sign_NV))


def _distance(p_NV: Tensor, q_NW: Tensor, value_N: Tensor) -> Tensor:
    """Write the distance; return p − q of each rank, over p. Both ascend, so the largest are the last."""
    V, W = p_NV.shape[1], q_NW.shape[1]
    shared = min(V, W)
    p_NV[:, V - shared :] -= q_NW[:, W - shared :]
    torch.sum(p_NV.abs(), 1, out=value_N)
    if W > V:
        value_N += q_NW[:, : W - V].sum(1)
    return p_NV


def _sorted(p_NV: Tensor) -> Tensor:
    """Return the rows ascending; p may be overwritten."""
    if p_NV.device.type != "cpu" or not _HAS_NUMPY:
        return p_NV.sort(dim=1).values
    _sort_here(p_NV)
    return p_NV


def _sorted_with_ids(p_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows ascending, and the ids; of equal ones the lowest id is last: the first rank."""
    last = p_NV.shape[1] - 1
    if p_NV.device.type != "cpu" or p_NV.dtype != torch.float32 or not _HAS_NUMPY:
        p_NV, order_NV = p_NV.flip(1).sort(dim=1, stable=True)
        return p_NV, order_NV.neg_().add_(last)
    key_NV = torch.empty(p_NV.shape, dtype=torch.int64)
    half_NVH = key_NV.view(torch.int32).view(*p_NV.shape, 2)
    half_NVH[..., _HIGH] = p_NV.view(torch.int32)
    half_NVH[..., 1 - _HIGH] = torch.arange(last, -1, -1, dtype=torch.int32)
    _sort_here(key_NV)
    p_NV.view(torch.int32).copy_(half_NVH[..., _HIGH])
    return p_NV, key_NV.bitwise_and_((1 << 32) - 1).neg_().add_(last)


def _sort_here(rows_NV: Tensor) -> None:
    """Sort each row in place, on as many threads as torch may use."""
    threads = min(torch.get_num_threads(), len(rows_NV))
    if threads <= 1:
        rows_NV.numpy().sort(axis=1)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.numpy().sort(axis=1), rows_NV.tensor_split(threads)))
