"""What one call of `linear_logprob` computes: which rows of the head together, and the statistics of a row.

    natural   r s r r s r s r r s r s          s in the subset, r the rest: ids as they come, and a mask
    tiles    [r s r][r s r][s r r][s r s]      each may hold both: a row has two maxima and two sums

    sorted    s s s s s | r r r r r r r        ids ascending within both
    tiles    [s s s][s s][r r r][r r r][r]     no tile holds both: one maximum, one sum, one GEMM for a mean

Natural tiles are plain stretches of the head: nothing is gathered, and dW is written where it stands; a
kernel reads the mask beside the logits. For torch's lines, which would pass over a tile once for each part,
and for the mean of a frozen head, which would take two GEMMs, rows are read through an index instead.

Dimensions: N tokens, V vocabulary, D hidden size, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels import deferred
from tokenkit.kernels.head import tiles
from tokenkit.kernels.head.call import head_of
from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.head.side import Side, side_of
from tokenkit.kernels.launch import runs_triton

REST, SUBSET, BOTH = 0, 1, 2
IGNORE = -100  # the default of torch.nn.functional.cross_entropy
RING_BYTES = 256 * 2**20  # of 16-bit dz that wait for one GEMM, on a GPU
RING_COLUMNS = 16384  # of the head's rows that one GEMM of dX adds up
BACKWARD_COLUMNS = 4096  # fewest of a tile in the backward where its bytes allow them: three GEMMs a tile
CPU_TILE_BYTES = 8 * 2**20  # stays in the last-level cache
COLUMNS = tiles.COLUMNS

Mode = Literal["statistics", "frozen", "cached", "recompute"]


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


@dataclass(frozen=True)
class Plan:
    """What forward and backward share."""

    mode: Mode
    side: Side
    tiles: list[Tile]
    stretches: list[list[Tile]]
    """Of the backward: the tiles whose dz enter its GEMMs together; they adjoin."""
    scored_N: Tensor
    """bool, the row is not ignored."""
    row_N: Tensor
    """int64, the target's row of weight_VD; -1: ignored, or on another process."""
    place_N: Tensor
    """int64, where the target stands in the order of the tiles; -1 likewise."""
    subset: Subset | None
    """Of the ids that are here."""
    inside_V: Tensor | None
    """uint8 mask of the subset by rows of the head; a pointer to bool would be one bit wide."""
    in_subset_N: Tensor | None
    """bool, the target is in the subset, wherever it is."""
    workspace_bytes: int
    has_triton: bool
    """Epilogues are Triton's."""

    @property
    def rows(self) -> int:
        """How many ids are here: V, of a divided vocabulary this process's part."""
        return self.side.columns

    @property
    def dtype(self) -> torch.dtype:
        """Of z and of every sum: float32, or float64."""
        return self.side.dtype


class Sums(NamedTuple):
    """The running statistics of each row."""

    max_PN: Tensor
    sum_PN: Tensor
    """Σ exp(z − max) without the target: of a very sure one, 1 − p is a sum and no difference."""
    z_target_N: Tensor


class Masses(NamedTuple):
    """What the statistics of each row say, each number from sums alone."""

    sum_PN: Tensor
    """Σ exp(z − max) of each part, the target in it."""
    mass_PN: Tensor
    """Of each part, of 1."""
    log_mass_PN: Tensor
    lse_N: Tensor
    logp_N: Tensor
    """0 in ignored rows, as are the next two."""
    p_N: Tensor
    others_N: Tensor
    """1 − p."""


def masses(sums: Sums, scored_N: Tensor, in_subset_N: Tensor | None) -> Masses:
    """Put the target back among the others.

    Args:
        sums: of the whole vocabulary, all processes.
        scored_N: bool, the row has a target.
        in_subset_N: bool, it is in the subset.
    """
    max_N = sums.max_PN.amax(0)
    is_in_PN = torch.stack([scored_N, torch.zeros_like(scored_N)])
    if in_subset_N is not None:
        is_in_PN = torch.stack([scored_N & ~in_subset_N, in_subset_N])
    # a part without ids has a maximum of −inf, and −inf − (−inf) is NaN
    sum_PN = sums.sum_PN + torch.where(is_in_PN, torch.exp(sums.z_target_N - sums.max_PN), 0)
    shrink_PN = torch.where(sums.max_PN == -torch.inf, 0, torch.exp(sums.max_PN - max_N))
    others_N = (sums.sum_PN * shrink_PN).sum(0)
    gap_N = torch.where(scored_N, sums.z_target_N - max_N, 0)
    target_N = torch.where(scored_N, gap_N.exp(), 0)
    total_N = others_N + target_N
    logp_N = torch.where(gap_N == 0, -torch.log1p(others_N), gap_N - total_N.log())
    return Masses(
        sum_PN,
        sum_PN * shrink_PN / total_N,
        (sums.max_PN - max_N) + (sum_PN.log() - total_N.log()),
        max_N + total_N.log(),
        torch.where(scored_N, logp_N, 0),
        target_N / total_N,
        torch.where(scored_N, others_N / total_N, 0),
    )


def make_plan(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    target_N: Tensor,
    subset: Sequence[Tensor],
    call: dict[str, Any],
) -> Plan:
    """Plan a call; `subset` holds the tensors of a `Subset`, or none.

    Args:
        tensors: hidden states, weight, bias.
        target_N: the targets.
        subset: of the whole vocabulary.
        call: what `linear_logprob` packed.

    Raises:
        ValueError: if the subset's mask is longer than the vocabulary, or a target no id.
    """
    hidden_ND, weight_VD, bias_V = tensors
    head = head_of(call["head"], weight_VD, bias_V)
    side = side_of("hidden_ND", hidden_ND, head, call["temperature"])
    if not deferred.waits(target_N):  # the check has not ended anything: look up ids alone
        target_N = target_N.where(_in_range(target_N, vocab_size(head)), IGNORE)
    start, end = side.first, side.first + side.columns
    scored_N = target_N != IGNORE
    row_N = torch.where(scored_N, target_N - start, -1)
    if head.shard is not None:
        row_N = torch.where((row_N >= 0) & (row_N < end - start), row_N, -1)
    place_N, here, in_subset_N, inside_V = row_N, None, None, None
    has_triton = runs_triton(hidden_ND)
    natural = has_triton and call["mode"] != "frozen"
    if subset:
        whole = extend(Subset(*subset), vocab_size(head))
        in_subset_N = scored_N & (whole.position_V[torch.where(scored_N, target_N, 0)] < whole.size)
        here = part_of(whole, start, end)
        inside_V = (here.position_V < here.size).to(torch.uint8)
        if end > start and not natural:
            place_N = torch.where(row_N >= 0, here.position_V[row_N.clamp_min(0)], -1)
    columns, backward_columns, ring = widths(side, call["mode"], call["workspace_bytes"])
    backward_tiles = cut(end - start, backward_columns, here, natural=natural)
    together = ring if natural and side.low != side.dtype else 1
    return Plan(
        mode=call["mode"],
        side=side,
        tiles=cut(end - start, columns, here, natural=natural),
        stretches=[backward_tiles[i : i + together] for i in range(0, len(backward_tiles), together)],
        scored_N=scored_N,
        row_N=row_N,
        place_N=place_N,
        subset=here,
        inside_V=inside_V,
        in_subset_N=in_subset_N,
        workspace_bytes=call["workspace_bytes"],
        has_triton=has_triton,
    )


def _in_range(target_N: Tensor, V: int) -> Tensor:
    return ((target_N >= 0) & (target_N < V)) | (target_N == IGNORE)


def check_targets(target_N: Tensor, V: int) -> None:
    """Name ids out of range."""
    words = f"target_N must hold ids in [0, {V}) or {IGNORE}"

    def error(row: int) -> ValueError:
        low, high = (int(x) for x in torch.aminmax(torch.where(target_N == IGNORE, 0, target_N)))
        return ValueError(f"{words}: got {low} to {high}; are they ids of the other model's tokenizer?")

    deferred.require(_in_range(target_N, V), words, ValueError, error)


def kept_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of a kept exp(z − m): as exact as the inputs; float16 lacks small numbers."""
    return torch.bfloat16 if hidden_ND.dtype.itemsize < 4 else hidden_ND.dtype


def widths(side: Side, mode: Mode, workspace_bytes: int) -> tuple[int, int, int]:
    """Return the columns of tiles in the forward and the backward, and how many of these enter one GEMM.

    Where z is kept, both have one width, and a program holds a whole row of a tile.
    """
    N, D = side.hidden_ND.shape
    size, fewest = side.dtype.itemsize, COLUMNS[0]
    if not side.hidden_ND.is_cuda:
        columns = tiles.width(N, size, min(CPU_TILE_BYTES, workspace_bytes), COLUMNS)
        return columns, columns, max(RING_COLUMNS // columns, 1)
    most = max(tiles.flop_width(N, D), fewest)
    most_back = max(most, BACKWARD_COLUMNS)
    room = min(tiles.TILE_BYTES, workspace_bytes)
    columns = tiles.width(N, size, room, (fewest, most))
    backward = tiles.width(N, size, room, (fewest, most_back))
    if mode in ("frozen", "cached"):
        columns = backward = min(backward, COLUMNS[1])
    ring_bytes = min(RING_BYTES, workspace_bytes - room)
    ring = min(ring_bytes // (max(N, 1) * 2), RING_COLUMNS) // backward
    return columns, backward, max(ring, 1)


def fits_cache(hidden_ND: Tensor, rows: int, workspace_bytes: int) -> bool:
    """Say whether exp(z − m) of every row fits into the budget beside a tile."""
    tile_bytes = tiles.TILE_BYTES if hidden_ND.is_cuda else CPU_TILE_BYTES
    return len(hidden_ND) * rows * kept_dtype(hidden_ND).itemsize + tile_bytes <= workspace_bytes
