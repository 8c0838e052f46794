"""Many texts or documents in one set of arrays: what a batch does to all of them, it does once.

Dimensions: K texts, B documents, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tokenkit.structs import Tokens

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FlatTokens:
    """One side of a batch, its documents end to end; see `structs.Tokens` for the fields."""

    ids_N: NDArray[np.int32]
    byte_ends_N: Ints
    """Position within the token's own document."""
    special_N: Bools
    trained_N: Bools
    offset_B: Ints
    """[B + 1] document b is tokens offset[b] to offset[b + 1], end exclusive."""

    @property
    def length_B(self) -> Ints:  # noqa: N802
        """Tokens of each document."""
        return np.diff(self.offset_B)


def flatten(documents: Sequence[Tokens]) -> FlatTokens:
    """Lay the documents of one side end to end."""
    empty = np.zeros(0, np.bool_)
    return FlatTokens(
        ids_N=np.concatenate([np.zeros(0, np.int32), *(tokens.ids for tokens in documents)]),
        byte_ends_N=np.concatenate([np.zeros(0, np.int64), *(tokens.byte_ends for tokens in documents)]),
        special_N=np.concatenate([empty, *(tokens.special for tokens in documents)]),
        trained_N=np.concatenate([empty, *(tokens.trained for tokens in documents)]),
        offset_B=offsets([len(tokens.ids) for tokens in documents]),
    )


def joined(parts: Iterable[FlatTokens]) -> FlatTokens:
    """Lay the documents of several batches end to end."""
    return flatten([tokens for part in parts for tokens in split(part)])


def split(flat: FlatTokens) -> list[Tokens]:
    """Return the documents one by one; they share the arrays."""
    borders = flat.offset_B.tolist()
    return [
        Tokens(flat.ids_N[a:b], flat.byte_ends_N[a:b], flat.special_N[a:b], flat.trained_N[a:b])
        for a, b in pairwise(borders)
    ]


def cut(flat: FlatTokens, length: int) -> FlatTokens:
    """Return the first tokens of each document, at most `length`."""
    length_B = flat.length_B
    if length_B.max(initial=0) <= length:
        return flat
    kept_N = np.arange(len(flat.ids_N)) - np.repeat(flat.offset_B[:-1], length_B) < length
    return FlatTokens(
        flat.ids_N[kept_N],
        flat.byte_ends_N[kept_N],
        flat.special_N[kept_N],
        flat.trained_N[kept_N],
        offsets(np.minimum(length_B, length)),
    )


def offsets(lengths: Sequence[int] | Ints) -> Ints:
    """Return where each of several neighbours starts, and where the last ends: one entry more."""
    result = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Plain texts as tokens, which lie in one set of arrays in any order.

    Text k has the tokens `start[k]` to `start[k] + length[k]`, or none if it is not spelled.
    """

    ids_N: NDArray[np.int32]
    ends_N: Ints
    """Bytes of the token's own text up to its end."""
    start_K: Ints
    length_K: Ints
    width_K: Ints
    """Bytes of each text."""
    is_spelled_K: Bools
    """The tokens spell the text, byte for byte."""

    def replaced(self, index: Sequence[int] | Ints, others: EncodedTexts) -> EncodedTexts:
        """Return the texts with those of these numbers taken from `others`."""
        columns = []
        for name in ("start_K", "length_K", "width_K", "is_spelled_K"):
            column_K = getattr(self, name).copy()
            column_K[index] = getattr(others, name) + (len(self.ids_N) if name == "start_K" else 0)
            columns.append(column_K)
        ids_N = np.concatenate([self.ids_N, others.ids_N])
        return EncodedTexts(ids_N, np.concatenate([self.ends_N, others.ends_N]), *columns)

    def tokens(self) -> list[Tokens | None]:
        """Return the texts one by one, None for each that is not spelled; they share the arrays."""
        special_N, trained_N = np.zeros(len(self.ids_N), bool), np.ones(len(self.ids_N), bool)
        result: list[Tokens | None] = []
        columns = (self.start_K.tolist(), self.length_K.tolist(), self.is_spelled_K.tolist())
        for start, length, is_spelled in zip(*columns, strict=True):
            here = slice(start, start + length)
            arrays = (self.ids_N[here], self.ends_N[here], special_N[here], trained_N[here])
            result.append(Tokens(*arrays) if is_spelled else None)
        return result


def no_texts(count: int) -> EncodedTexts:
    """Return so many texts of which none is spelled."""
    zero_K = np.zeros(count, np.int64)
    return EncodedTexts(
        np.zeros(0, np.int32), np.zeros(0, np.int64), zero_K, zero_K, zero_K, np.zeros(count, bool)
    )


def walked_texts(parts: Sequence[tuple[Sequence[int], Ints]]) -> EncodedTexts:
    """Return texts from the ids and ends of each."""
    length_K = np.array([len(ids) for ids, _ in parts], np.int64)
    return EncodedTexts(
        ids_N=np.concatenate([np.array(ids, np.int32) for ids, _ in parts]),
        ends_N=np.concatenate([ends for _, ends in parts]),
        start_K=offsets(length_K)[:-1],
        length_K=length_K,
        width_K=np.array([int(ends[-1]) if len(ends) else 0 for _, ends in parts], np.int64),
        is_spelled_K=np.ones(len(parts), bool),
    )
