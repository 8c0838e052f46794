"""Heads whose rows are divided over processes: which ids are here, and the sums that make one head of all.

    rank 0    ids 0 .. 41        hidden states and targets are the same on every rank;
    rank 1    ids 42 .. 83       a few float32 numbers per token travel in the forward,
    rank 2    ids 84 .. 99, and padding    the gradient of the hidden states in the backward.

Without a shard every function here is the identity. Ranks must call an operation in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tokenkit.kernels import deferred
from tokenkit.structs import Head


def vocab_size(head: Head) -> int:
    """Return the number of ids of the whole head, padding left out."""
    return head.weight_VD.shape[0] if head.vocab_size is None else head.vocab_size


def local_rows(head: Head) -> tuple[int, int]:
    """Return [start, end): the ids that are here, padding left out. Row i of weight_VD is id start + i."""
    if head.shard is None:
        return 0, vocab_size(head)
    start = min(head.shard.start, vocab_size(head))
    return start, min(start + head.weight_VD.shape[0], vocab_size(head))


def check_cover(head: Head, device: torch.device) -> None:
    """Raise ValueError on every rank if the ranks' rows do not add up to the vocabulary.

    One integer travels; on a GPU nothing waits, and `deferred.raise_found` raises it.
    """
    if head.shard is None:
        return
    start, end = local_rows(head)
    held = reduce_sum(torch.full((), end - start, dtype=torch.int64, device=device), head)
    words = f"the ranks of head.shard must hold each of the {head.vocab_size} ids once"
    deferred.require(
        held.eq(vocab_size(head)),
        words,
        ValueError,
        lambda row: ValueError(f"{words}: got {int(held)} rows; this one holds [{start}, {end})"),
    )


def reduce_max(x: Tensor, head: Head) -> Tensor:
    """Return the largest of each number over the ranks that share the head; in place where there are any."""
    return _reduce(x, head, dist.ReduceOp.MAX)


def reduce_sum(x: Tensor, head: Head) -> Tensor:
    """Return the sum of each number over the ranks that share the head; in place where there are any."""
    return _reduce(x, head, dist.ReduceOp.SUM)


def _reduce(x: Tensor, head: Head, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if head.shard is not None:
        x = x.contiguous()
        dist.all_reduce(x, operation, group=head.shard.group)
    return x
