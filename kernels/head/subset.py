"""Which rows of a head are multiplied together: tiles of the vocabulary, a subset's rows apart from the rest.

    natural   r s r r s r s r r s r s          s in the subset, r the rest: ids as they come, and a mask
    tiles    [r s r][r s r][s r r][s r s]      each may hold both: a row has two maxima and two sums

    sorted    s s s s s | r r r r r r r        ids ascending within both
    tiles    [s s s][s s][r r r][r r r][r]     no tile holds both: one maximum, one sum, one GEMM for a mean

Natural tiles are plain stretches of the head: nothing is gathered, and dW is written where it stands; a
kernel reads the mask beside the logits. For torch's lines, which would pass over a tile once for each part,
and for the mean of a frozen head, which would take two GEMMs, rows are read through an index instead.

Dimensions: V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REST, SUBSET, BOTH = 0, 1, 2


class Subset(NamedTuple):
    """A subset of a vocabulary in the order that the tiles use. Made by `split_vocabulary`."""

    order_V: Tensor
    """int64, every id: the subset's first, ascending, then the rest, ascending."""
    position_V: Tensor
    """int64, where each id stands in `order_V`."""
    inside_V: Tensor
    """bool, the mask, on the CPU: sizes of tiles are counted there without a wait for the device."""

    @property
    def size(self) -> int:
        """How many ids belong to the subset."""
        return int(self.inside_V.count_nonzero())


class Tile(NamedTuple):
    """A stretch [start, end) of the order, and the rows of the head that it names."""

    start: int
    end: int
    part: int
    """REST or SUBSET: what every row of this tile belongs to; BOTH: what the mask says."""
    rows: slice | Tensor


def split_vocabulary(subset_V: Tensor) -> Subset:
    """Put a subset's ids before the rest. Waits for the device once, to count them.

    Args:
        subset_V: bool. Ids beyond its end belong to the rest (`extend`).

    Raises:
        ValueError: if the mask is not bool, or holds no id.
    """
    if subset_V.dtype != torch.bool or subset_V.ndim != 1:
        raise ValueError(f"subset_V must be a bool mask [V]: got {subset_V.dtype} {tuple(subset_V.shape)}")
    return Subset(*_split_vocabulary(subset_V))


@torch.library.custom_op("tokenkit::split_vocabulary", mutates_args=())
def _split_vocabulary(subset_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside_V = torch.empty(subset_V.shape, dtype=torch.bool, device="cpu").copy_(subset_V)
    if not inside_V.any():
        raise ValueError("subset_V holds no id: the mass of an empty subset has no logarithm")
    return *_order(subset_V), inside_V


@_split_vocabulary.register_fake
def _(subset_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order_V = torch.empty_like(subset_V, dtype=torch.int64)
    return order_V, torch.empty_like(order_V), torch.empty_like(subset_V, device="cpu")


def _order(subset_V: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids of the subset and then the others, and where each id stands among them."""
    order_V = torch.argsort((~subset_V).to(torch.uint8), stable=True)
    position_V = torch.empty_like(order_V)
    position_V[order_V] = torch.arange(len(order_V), device=order_V.device)
    return order_V, position_V


def extend(subset: Subset, vocab_size: int) -> Subset:
    """Return the subset of a head of `vocab_size` rows; the ids beyond its mask belong to the rest.

    Raises:
        ValueError: if the mask was longer than the vocabulary.
    """
    known = len(subset.order_V)
    if known > vocab_size:
        raise ValueError(
            f"the subset's mask covers {known} ids but the head has {vocab_size}: "
            "is it the mask of the other model's tokenizer?"
        )
    if known == vocab_size:
        return subset
    more_V = torch.arange(known, vocab_size, device=subset.order_V.device)
    inside_V = torch.nn.functional.pad(subset.inside_V, (0, vocab_size - known))
    return Subset(torch.cat([subset.order_V, more_V]), torch.cat([subset.position_V, more_V]), inside_V)


def part_of(subset: Subset, start: int, end: int) -> Subset:
    """Return the subset among ids [start, end) alone, counted from `start`; it may be empty."""
    if (start, end) == (0, len(subset.order_V)):
        return subset
    inside_V = subset.inside_V[start:end]
    return Subset(*_order(subset.position_V[start:end] < subset.size), inside_V)


def cut(vocab_size: int, columns: int, subset: Subset | None, *, natural: bool) -> list[Tile]:
    """Cut the vocabulary into tiles of at most `columns` rows of the head.

    Args:
        vocab_size: how many rows there are.
        columns: of a tile.
        subset: of them.
        natural: keep the order of the head.
    """
    tiles = []
    size = 0 if subset is None or natural else subset.size
    for part, first, last in ((SUBSET, 0, size), (REST, size, vocab_size)):
        for start in range(first, last, columns):
            end = min(start + columns, last)
            if subset is None or natural:
                tiles.append(Tile(start, end, REST if subset is None else BOTH, slice(start, end)))
            else:
                tiles.append(Tile(start, end, part, subset.order_V[start:end]))
    return tiles
