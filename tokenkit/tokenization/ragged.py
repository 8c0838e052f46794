"""Many texts or documents in one set of arrays: what a batch does to all of them, it does once.

`Speller` finds where the tokens of many texts end, and whether they spell the texts byte for byte. The bytes
of a token are kept as words of eight, the last one filled up with zeros. So are eight bytes of the text from
any position on: a batch is compared token by token, but without a loop over tokens.

Dimensions: K texts, B documents, N tokens, V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

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


WORD = 8  # bytes
_KEPT = np.array([(1 << 8 * count) - 1 for count in range(WORD + 1)], np.uint64)  # the first bytes of a word
_NOTHING = 1  # as the word of a token of no bytes: never equal to no bytes of the text


class Speller:
    """The bytes of every token of a vocabulary."""

    def __init__(self, token_bytes: Sequence[bytes], length_V: NDArray[np.int32]) -> None:
        """Read the vocabulary; a token of length 0 (a special one) is no text, whatever its bytes say."""
        raw = b"".join(token_bytes)
        all_V = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
        first_V = offsets(np.maximum(-(-all_V // WORD), 1))
        self._word = np.zeros(first_V[-1], "<u8")
        place = np.repeat(WORD * first_V[:-1] - offsets(all_V)[:-1], all_V) + np.arange(len(raw))
        self._word.view(np.uint8)[place] = np.frombuffer(raw, np.uint8)
        self._first_V = first_V[:-1]
        self._word[self._first_V[length_V == 0]] = _NOTHING
        # Side by side, because what a batch waits for is memory: one cache line per token
        self._word_and_length_V = np.stack([self._word[self._first_V], length_V.astype(np.uint64)], axis=1)

    def place(
        self, ids_of_each: Sequence[Sequence[int]], texts: Sequence[bytes], *, may_add_space: bool
    ) -> EncodedTexts:
        """Lay the tokens of texts out and compare them with the texts.

        Args:
            ids_of_each: the ids of each text.
            texts: what they should spell, in UTF-8.
            may_add_space: the tokenizer may have put a space in front of a text, which is not the text's.
        """
        length_K = np.fromiter(map(len, ids_of_each), np.int64, len(texts))
        width_K = np.fromiter(map(len, texts), np.int64, len(texts))
        offset_K = offsets(length_K)
        # half the time of np.fromiter
        packed = struct.pack(f"{offset_K[-1]}q", *chain.from_iterable(ids_of_each))
        ids_N = np.frombuffer(packed, np.int64)
        word_N, size_N = self._word_and_length_V.take(ids_N, axis=0).T
        size_N = size_N.astype(np.int64)
        end_N = offsets(size_N)  # bytes of the whole batch
        before_K = end_N[offset_K[:-1]]
        spaces_K = end_N[offset_K[1:]] - before_K - width_K
        is_spelled_K = (spaces_K == 0) | (spaces_K == 1) if may_add_space else spaces_K == 0
        # Each text stands behind a space: where the tokenizer put one, its tokens begin there.
        batch = b" ".join([b"", *texts, bytes(WORD)])
        at_K = offsets(width_K + 1)[:-1] + 1
        start_N = end_N[:-1] + np.repeat(at_K - spaces_K - before_K, length_K)
        differs = np.flatnonzero(~self._stands_at(start_N, ids_N, size_N, word_N, batch))
        if len(differs):
            is_spelled_K[np.searchsorted(offset_K, differs, side="right") - 1] = False
        ends_N = end_N[1:] - np.repeat(before_K + spaces_K, length_K)
        return EncodedTexts(ids_N.astype(np.int32), ends_N, offset_K[:-1], length_K, width_K, is_spelled_K)

    def _stands_at(
        self, start_N: Ints, ids_N: Ints, size_N: Ints, word_N: NDArray[np.uint64], text: bytes
    ) -> Bools:
        """Return whether the bytes of each token stand at its place in the text."""
        word_at = np.ndarray(len(text) - WORD + 1, "<u8", text, strides=(1,))
        # clip: a text that is not spelled may reach beyond the end
        found_N = word_at.take(start_N, mode="clip") & _KEPT.take(size_N, mode="clip")
        result_N = found_N == word_N
        longer = np.flatnonzero(size_N > WORD)
        done = WORD
        while len(longer):
            rest = size_N[longer] - done
            found = word_at.take(start_N[longer] + done, mode="clip") & _KEPT.take(rest, mode="clip")
            result_N[longer] &= found == self._word[self._first_V[ids_N[longer]] + done // WORD]
            longer = longer[rest > WORD]
            done += WORD
        return result_N


def place_bytes(texts: Sequence[bytes]) -> EncodedTexts:
    """Lay texts out whose ids are their bytes."""
    width_K = np.fromiter(map(len, texts), np.int64, len(texts))
    offset_K = offsets(width_K)
    ids_N = np.frombuffer(b"".join(texts), np.uint8).astype(np.int32)
    ends_N = np.arange(1, len(ids_N) + 1) - np.repeat(offset_K[:-1], width_K)
    return EncodedTexts(ids_N, ends_N, offset_K[:-1], width_K, width_K, np.ones(len(texts), bool))
