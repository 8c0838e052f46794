"""Rows of a new vocabulary as weighted sums of old rows, and the matrices that they make.

    new_v = Σ_k weight_k · old[id_k]        over the old ids of row v; a plain mean where no weights are given

Every initialisation but the random one and the hypernetwork is such a sum, found once for all matrices.

Dimensions: V new vocabulary, W old vocabulary, D hidden size, K old ids in all sums together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 2**26
"""Float32 copies of rows are made this many bytes at a time: a whole matrix of them would double a model."""


LABELS = ("special", "same_bytes", "mean_of_pieces", "mean_of_all")
"""What a row can be made of; those that are copied come first."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """What the ids of one tokenizer index in a model."""

    embedding_WD: Tensor
    """Input embedding."""
    output_WD: Tensor | None
    """Head; None: tied, the input embedding is the head."""
    bias_W: Tensor | None
    """Bias of the head, where it has one."""
    table_WE: Tensor | None = None
    """Rows for every layer, side by side, where the model has such a table (Gemma 3n, Gemma 4)."""


@dataclass(frozen=True, slots=True)
class RowSources:
    """From which old rows each new row is made, and why."""

    old_ids_K: Tensor
    """int64, the old ids of all rows, one row after the other."""
    offset_V: Tensor
    """int64 [V], where each row begins in `old_ids_K`."""
    method_V: NDArray[np.uint8]
    """Index into `labels`."""
    labels: tuple[str, ...] = LABELS
    """What a row can be made of. Rows of "mean_of_all" are the mean of all old rows."""
    weight_K: Tensor | None = None
    """float32; None: each row is the mean of its old rows."""

    def report(self) -> dict[str, int]:
        """Return how many rows were made of what."""
        counts = np.bincount(self.method_V, minlength=len(self.labels))
        return {label: int(count) for label, count in zip(self.labels, counts, strict=True)}

    def rows(self, old_WD: Tensor, size: int) -> Tensor:
        """Return the new matrix, `size` rows of `old_WD`'s dtype; sums are float32 or better.

        Rows without a source, and padding rows from `len(offset_V)` on, are the mean of all old rows: as
        part of a head they then draw next to no probability, which zeros would not guarantee.
        """
        old_WD = old_WD.detach()
        new = old_WD.new_empty(size, old_WD.shape[1])
        count = len(self.offset_V)
        end_V = torch.cat([self.offset_V[1:], torch.tensor([len(self.old_ids_K)])])
        for start, stop in self._pieces(end_V, old_WD):
            part = slice(int(self.offset_V[start]), int(end_V[stop - 1]))
            new[start:stop] = self._sums(old_WD, part, self.offset_V[start:stop])
        without = torch.ones(size, dtype=torch.bool)
        if "mean_of_all" in self.labels:
            without[:count] = torch.from_numpy(self.method_V == self.labels.index("mean_of_all"))
        else:
            without[:count] = False
        new[without] = mean_row(old_WD).to(new.dtype)
        return new

    def part(self, start: int, stop: int) -> RowSources:
        """Return the sources of the rows from `start` to before `stop`."""
        first = int(self.offset_V[start])
        ids = slice(first, int(self.offset_V[stop]) if stop < len(self.offset_V) else len(self.old_ids_K))
        weight_K = None if self.weight_K is None else self.weight_K[ids]
        return RowSources(
            self.old_ids_K[ids],
            self.offset_V[start:stop] - first,
            self.method_V[start:stop],
            self.labels,
            weight_K,
        )

    def _pieces(self, end_V: Tensor, old_WD: Tensor) -> Iterator[tuple[int, int]]:
        """Cut the rows where their old ids together reach a chunk."""
        limit = max(1, CHUNK_BYTES // (4 * old_WD.shape[1]))
        start, count = 0, len(self.offset_V)
        while start < count:
            reach = int(self.offset_V[start]) + limit
            stop = int(torch.searchsorted(end_V, reach, right=True))
            stop = min(max(stop, start + 1), start + limit, count)
            yield start, stop
            start = stop

    def _sums(self, old_WD: Tensor, part: slice, offset: Tensor) -> Tensor:
        ids, place = torch.unique(self.old_ids_K[part], return_inverse=True)
        old = old_WD[ids]
        old = old.to(torch.promote_types(old.dtype, torch.float32))
        if self.weight_K is None:
            return torch.nn.functional.embedding_bag(place, old, offset - part.start, mode="mean")
        weight = self.weight_K[part].to(old.dtype)
        return torch.nn.functional.embedding_bag(
            place, old, offset - part.start, mode="sum", per_sample_weights=weight
        )


def from_lists(
    ids: Sequence[Sequence[int] | NDArray[np.int64]],
    method_V: NDArray[np.uint8],
    labels: tuple[str, ...] = LABELS,
    weights: Sequence[Sequence[float] | NDArray[np.float64]] | None = None,
) -> RowSources:
    """Return the sources of rows given as one list of old ids, and perhaps of weights, for each."""
    length_V = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.concatenate([np.asarray(row, np.int64) for row in ids])
    weight_K = None
    if weights is not None:
        weight_K = torch.from_numpy(np.concatenate([np.asarray(row, np.float32) for row in weights]))
    offset_V = np.cumsum(length_V) - length_V
    return RowSources(torch.from_numpy(flat), torch.from_numpy(offset_V), method_V, labels, weight_K)


def chunks(old_WD: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a matrix, a piece at a time, in float32 or better."""
    dtype = torch.promote_types(old_WD.dtype, torch.float32)
    step = max(1, CHUNK_BYTES // (4 * old_WD.shape[1]))
    for start in range(0, len(old_WD), step):
        yield old_WD[start : start + step].detach().to(dtype)


def mean_row(old_WD: Tensor) -> Tensor:
    """Return the mean of all rows, [D], float32 or better, without a float32 copy of the matrix."""
    total = sum((part.double().sum(0) for part in chunks(old_WD)), torch.zeros((), dtype=torch.float64))
    return (total / len(old_WD)).to(torch.promote_types(old_WD.dtype, torch.float32))
