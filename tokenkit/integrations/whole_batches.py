"""Rows to evaluate on, filled up to whole batches of all processes, so that no row is counted twice.

Where rows do not divide evenly, Accelerate repeats the first ones in the last batch. What stands in for them
here is known to the collator, and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset


@dataclass(frozen=True)
class Filler:
    """Takes the place of a row that is not there."""

    row: Any
    """One that is, for who cannot do without."""


def real_rows(rows: Sequence[Any]) -> list[Any]:
    """Return the rows that are no `Filler`."""
    return [row for row in rows if not isinstance(row, Filler)]


def filled(rows: Any, size: int) -> Any:
    """Return a data set with `Filler`s behind its rows, up to a multiple of `size`; None for None."""
    if rows is None or isinstance(rows, Filled | FilledStream):
        return rows
    if isinstance(rows, IterableDataset):
        return FilledStream(rows, size)
    return Filled(rows, size) if isinstance(rows, Sized) and len(rows) % size else rows


class Filled(Dataset[Any]):
    """A data set of known length.

    Args:
        rows: indexed by number.
        size: rows of one batch of all processes.
    """

    def __init__(self, rows: Any, size: int):
        self.rows = rows
        self._length = -(-len(rows) // size) * size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self.rows[index] if index < len(self.rows) else Filler(self.rows[0])


class FilledStream(IterableDataset[Any]):
    """A stream: of each worker, where several read it.

    Args:
        rows: iterated anew for each evaluation.
        size: rows of one batch of all processes.
    """

    def __init__(self, rows: Any, size: int):
        self.rows, self._size = rows, size

    def __iter__(self) -> Iterator[Any]:
        first, number = None, 0
        for number, row in enumerate(self.rows, 1):
            first = row if number == 1 else first
            yield row
        for _ in range(-number % self._size):
            yield Filler(first)

    def set_epoch(self, epoch: int) -> None:
        """Hand the number of the pass on."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
