"""Documents one behind the other in rows of one length: no token of a step is padding.

A stretch of tokens that begins a row, or a document, has positions of its own from 0 on. So a model that
reads positions (`models.check.check_packing`) keeps documents apart. What a row has no room for goes on in
the next one, without what stood before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenkit.data.collate import AlignedCollator
from tokenkit.data.mix import Mix
from tokenkit.data.sources import check_count
from tokenkit.structs import Batch, Side

BLOCK = 64
"""Documents that are tokenized together."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a batch, without padding."""

    ids_T: NDArray[np.int32]
    position_T: NDArray[np.int64]
    """From the beginning of each document, or of what is left of it, on."""
    trained_T: NDArray[np.bool_]


class PackedRows:
    """Gives out rows where a `Mix` gives out documents, and collates them: `Batches` takes it for both.

    Every process tokenizes all rows of a step, so that neither their number nor that of micro-batches changes
    what a step sees.

    Args:
        mix: the documents; only this object may read it from now on.
        collator: tokenizes them, by its student's tokenizer.
        length: tokens of a row.
    """

    def __init__(self, mix: Mix, collator: AlignedCollator, length: int) -> None:
        self._mix, self._collator, self._length = mix, collator, length
        self._block = mix.state_dict()
        """Of the mix, in front of the documents that were tokenized last."""
        self._used = 0
        """Tokens of those that were given out."""
        self._tokens = Row(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
        """Not given out yet; positions are those in the whole document."""

    @property
    def reading(self) -> str:
        """Where the mix is, for people."""
        return self._mix.reading

    @property
    def skipped(self) -> Counter[str]:
        """Documents that could not be tokenized, by reason."""
        return self._collator.skipped

    @property
    def altered(self) -> Counter[str]:
        """Characters that were dropped or replaced, and in how many rows."""
        return self._collator.altered

    def take(self, count: int) -> list[Row]:
        """Return the next `count` rows; `mix.Mix.__next__` says what it raises.

        Raises:
            ValueError: none of a block's documents can be tokenized.
        """
        wanted = count * self._length
        while len(self._tokens.ids_T) < wanted:
            left = self._tokens
            self._block = self._mix.state_dict()
            block = self._tokenized()
            self._used = -len(left.ids_T)  # what is left of the block before is given out first
            self._tokens = Row(
                *(
                    np.concatenate([getattr(left, name), getattr(block, name)])
                    for name in ("ids_T", "position_T", "trained_T")
                )
            )
        self._used += wanted
        rows = [self._row(start) for start in range(0, wanted, self._length)]
        self._tokens = _from(self._tokens, wanted)
        return rows

    def _tokenized(self) -> Row:
        documents = self._mix.take(BLOCK)
        flat = self._collator.tokens_of(documents)
        if not flat.trained_N.any():
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise ValueError(f"none of {len(documents)} documents could be tokenized: {reasons}")
        position_N = np.arange(len(flat.ids_N)) - np.repeat(flat.offset_B[:-1], flat.length_B)
        return Row(flat.ids_N, position_N, flat.trained_N)

    def _row(self, start: int) -> Row:
        here = slice(start, start + self._length)
        position_T = self._tokens.position_T[here]
        index_T = np.arange(self._length)
        begins_T = np.where((position_T == 0) | (index_T == 0), index_T, 0)
        position_T = index_T - np.maximum.accumulate(begins_T)
        # nothing predicts the first token of a document
        return Row(self._tokens.ids_T[here], position_T, self._tokens.trained_T[here] & (position_T > 0))

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Return the batch of some rows: one tokenization, which stands for both sides, and no chunks."""
        ids_BT = torch.from_numpy(np.stack([row.ids_T for row in rows]).astype(np.int64))
        side = Side(
            ids_BT=ids_BT,
            length_B=torch.full((len(rows),), self._length),
            trained_BT=torch.from_numpy(np.stack([row.trained_T for row in rows])),
            eos_id=self._collator.student_tokenizer.eos_id,
            position_BT=torch.from_numpy(np.stack([row.position_T for row in rows])),
        )
        return Batch(side, side, {})

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the mix in front of the newest block, and what was given out of that; JSON."""
        return {**self._block, "packed": self._used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: the state is of a run that did not pack, or see `mix.Mix.load_state_dict`.
        """
        if "packed" not in state:
            raise ValueError("the state is of a run without pack: resume with the same configuration")
        check_count("packed", state["packed"])
        self._mix.load_state_dict(state)
        self._block, self._used = self._mix.state_dict(), 0
        self._tokens = _from(self._tokens, len(self._tokens.ids_T))
        if state["packed"]:
            before = Counter(self.skipped), Counter(self.altered)
            self._tokens = _from(self._tokenized(), state["packed"])
            for counter, then in zip((self.skipped, self.altered), before, strict=True):
                counter.clear()  # these rows were counted when they were read first
                counter.update(then)
            self._used = state["packed"]


def _from(tokens: Row, start: int) -> Row:
    return Row(tokens.ids_T[start:], tokens.position_T[start:], tokens.trained_T[start:])
