"""What one call of `linear_logprob` computes, from tensors, numbers and words: an operation takes no records.

Dimensions: N tokens, V vocabulary, D hidden size, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from tokenkit.kernels.vocabulary import Subset, Tile, cut, extend, part_of
from tokenkit.kernels.vocabulary_parallel import local_rows, shard_of, shard_words, vocab_size
from tokenkit.structs import Head

IGNORE = -100  # the default of torch.nn.functional.cross_entropy
FORWARD_TILE_BYTES = 32 * 2**20  # of float32 z, on a GPU
BACKWARD_TILE_BYTES = 128 * 2**20  # 4096 columns at 8192 tokens: the GEMM of dW stays large
CPU_TILE_BYTES = 8 * 2**20  # stays in the last-level cache
COLUMNS = (
    128,
    8192,
)  # fewest: GEMMs smaller than this waste time; most: one program holds a row in registers

Mode = Literal["statistics", "frozen", "cached", "recompute"]


class Call(NamedTuple):
    """What a call consists of besides tensors."""

    mode: Mode
    alpha: float
    """scale / temperature."""
    cap: float | None
    """softcap / temperature."""
    vocab_size: int | None
    start: int
    group_name: str
    workspace_bytes: int

    def head(self, weight_VD: Tensor, bias_V: Tensor | None) -> Head:
        """Return the head of the call, temperature included."""
        shard = shard_of(self.group_name, self.start)
        return Head(weight_VD, bias_V, self.cap, self.alpha, self.vocab_size, shard)


def pack(head: Head, temperature: float, mode: Mode, workspace_bytes: int) -> tuple[list[float], str]:
    """Return a call as numbers and words: an operation's schema has no records."""
    group_name, start = shard_words(head)
    cap = 0.0 if head.softcap is None else head.softcap / temperature
    size = 0 if head.vocab_size is None else head.vocab_size
    return [head.scale / temperature, cap, size, start, workspace_bytes], f"{mode} {group_name}"


def unpack(numbers: Sequence[float], words: str) -> Call:
    """Return the call that `pack` packed."""
    alpha, cap, size, start, workspace_bytes = numbers
    mode, group_name = words.split(" ", 1)
    return Call(
        cast(Mode, mode), alpha, cap or None, int(size) or None, int(start), group_name, int(workspace_bytes)
    )


@dataclass(frozen=True)
class Plan:
    """What forward and backward share besides the tensors that may need gradients."""

    mode: Mode
    tiles: list[Tile]
    backward_tiles: list[Tile]
    rows: int
    """How many ids are here: V, of a divided vocabulary this process's part."""
    scored_N: Tensor
    """bool, the row is not ignored."""
    row_N: Tensor
    """int64, the target's row of weight_VD; -1: ignored, or on another process."""
    position_N: Tensor
    """int64, where the target stands in the order of the tiles; -1 likewise."""
    subset: Subset | None
    """Of the ids that are here."""
    in_subset_N: Tensor | None
    """bool, the target is in the subset, wherever it is."""
    alpha: float
    cap: float | None
    dtype: torch.dtype
    """Of z and of every sum: float32, or float64."""
    workspace_bytes: int


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


def make_plan(hidden_ND: Tensor, head: Head, target_N: Tensor, subset: Sequence[Tensor], call: Call) -> Plan:
    """Plan a call; `subset` holds the tensors of a `Subset`, or none.

    Raises:
        ValueError: if the subset's mask is longer than the vocabulary.
    """
    start, end = local_rows(head)
    rows = end - start
    scored_N = target_N != IGNORE
    row_N = torch.where(scored_N, target_N - start, -1)
    if call.group_name:
        row_N = torch.where((row_N >= 0) & (row_N < rows), row_N, -1)
    position_N, here, in_subset_N = row_N, None, None
    if subset:
        whole = extend(Subset(*subset), vocab_size(head))
        in_subset_N = scored_N & (whole.position_V[torch.where(scored_N, target_N, 0)] < whole.size)
        here = part_of(whole, start, end)
        if rows:
            position_N = torch.where(row_N >= 0, here.position_V[row_N.clamp_min(0)], -1)
    columns, backward_columns = columns_of(hidden_ND, call)
    return Plan(
        mode=call.mode,
        tiles=cut(rows, columns, here),
        backward_tiles=cut(rows, backward_columns, here),
        rows=rows,
        scored_N=scored_N,
        row_N=row_N,
        position_N=position_N,
        subset=here,
        in_subset_N=in_subset_N,
        alpha=call.alpha,
        cap=call.cap,
        dtype=sum_dtype(hidden_ND),
        workspace_bytes=call.workspace_bytes,
    )


def sum_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of z and of every sum: float32, or float64 for float64."""
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def kept_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of a kept exp(z − m): as exact as the inputs; float16 lacks small numbers."""
    return torch.bfloat16 if hidden_ND.dtype.itemsize < 4 else hidden_ND.dtype


def columns_of(hidden_ND: Tensor, call: Call) -> tuple[int, int]:
    """Return the widths of tiles in the forward and in the backward; where z is kept they are one width."""
    forward_bytes, backward_bytes = FORWARD_TILE_BYTES, BACKWARD_TILE_BYTES
    if not hidden_ND.is_cuda:
        forward_bytes = backward_bytes = CPU_TILE_BYTES
    if call.mode in ("frozen", "cached"):
        forward_bytes = backward_bytes
    fewest, most = COLUMNS
    column_bytes = max(len(hidden_ND), 1) * sum_dtype(hidden_ND).itemsize
    widths = [
        min(max(min(tile_bytes, call.workspace_bytes) // column_bytes // fewest * fewest, fewest), most)
        for tile_bytes in (forward_bytes, backward_bytes)
    ]
    return widths[0], widths[1]


def fits_cache(hidden_ND: Tensor, rows: int, workspace_bytes: int) -> bool:
    """Say whether exp(z − m) of every row fits into the budget beside a tile."""
    tile_bytes = BACKWARD_TILE_BYTES if hidden_ND.is_cuda else CPU_TILE_BYTES
    return len(hidden_ND) * rows * kept_dtype(hidden_ND).itemsize + tile_bytes <= workspace_bytes
