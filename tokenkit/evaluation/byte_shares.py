"""Which bytes of a text a tokenization has bits for: the one definition behind every figure in bits per byte.

    bits per byte = −Σ log2 p(token) · share(token) / Σ bytes that count

A token's bits are shared out equally over the bytes that it stands for; those of a token of no width go to
the token after it. A byte counts where every side that is compared scores it: tokens of text alone, that a
loss mask keeps, that have something before them (where no BOS is written, the first token has not) and that
say which text they stand for (not an unknown token). `share` is the part of a token's bytes that count.

Dimensions: B documents, N tokens of one side, A bytes of the axis on which all documents stand end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenkit.pairing.align import token_spans
from tokenkit.tokenization.ragged import Bools, FlatTokens, Ints, offsets
from tokenkit.tokenization.tokenizer import Tokenizer

Floats = NDArray[np.float64]


class Shares(NamedTuple):
    """What counts of some documents."""

    share_N: tuple[Floats, ...]
    """By side, for each token: from 0 to 1."""
    num_bytes: int


@dataclass(frozen=True)
class Placed:
    """One side's tokens on the axis of the batch."""

    start_N: Ints
    """Where the bytes begin that the token's bits go to."""
    end_N: Ints
    is_scored_N: Bools
    """False: its bits go nowhere."""

    def scored_bytes(self, length: int) -> Bools:
        """Return [A] which bytes this side has bits for."""
        borders = [np.unique(edge_N[self.is_scored_N]) for edge_N in (self.start_N, self.end_N)]
        change_A = np.zeros(length + 1, np.int64)
        change_A[borders[0]] += 1
        change_A[borders[1]] -= 1
        return np.cumsum(change_A)[:-1] > 0

    def shares(self, counted_A: Bools) -> Floats:
        """Return [N] which part of each token's bytes counts."""
        before_A = offsets(counted_A.astype(np.int64))
        width_N = np.maximum(self.end_N - self.start_N, 1)
        return self.is_scored_N * (before_A[self.end_N] - before_A[self.start_N]) / width_N

    def spread(self, bits_N: Floats, length: int) -> Floats:
        """Return [A] the bits of each byte, NaN where this side has none."""
        here = self.is_scored_N
        width_N = self.end_N[here] - self.start_N[here]
        change_A = np.bincount(self.start_N[here], bits_N[here] / width_N, length + 1)[: length + 1]
        sum_A = np.zeros(length)
        start, place = np.unique(self.start_N[here], return_index=True)
        width = width_N[place]
        index = np.repeat(start - offsets(width)[:-1], width) + np.arange(width.sum())
        sum_A[index] = np.repeat(change_A[start], width)
        return np.where(self.scored_bytes(length), sum_A, np.nan)


def place(sides: Sequence[FlatTokens], tokenizers: Sequence[Tokenizer]) -> tuple[list[Placed], Ints]:
    """Put the tokens of the same documents in several tokenizations on one axis.

    Returns:
        The sides, and where each document starts on the axis, [B + 1].
    """
    spans = [token_spans(side) for side in sides]
    widths = [
        [ends.max(initial=0) for ends in np.split(e, s.offset_B[1:-1])]
        for s, (_, e) in zip(sides, spans, strict=True)
    ]
    start_B = offsets(np.max(np.array(widths, np.int64).reshape(len(sides), -1), axis=0))
    placed = [
        _placed(side, span, tokenizer, start_B)
        for side, span, tokenizer in zip(sides, spans, tokenizers, strict=True)
    ]
    return placed, start_B


def shares(sides: Sequence[FlatTokens], tokenizers: Sequence[Tokenizer]) -> Shares:
    """Find what counts of documents in several tokenizations, which need not reach equally far."""
    placed, start_B = place(sides, tokenizers)
    length = int(start_B[-1])
    counted_A = np.logical_and.reduce([one.scored_bytes(length) for one in placed])
    return Shares(tuple(one.shares(counted_A) for one in placed), int(counted_A.sum()))


def predicted(side: FlatTokens, tokenizer: Tokenizer) -> Bools:
    """Return the tokens of text that a model gives a probability, and that say what they stand for."""
    predicted_N = side.trained_N & ~side.special_N
    predicted_N[side.offset_B[:-1][side.length_B > 0]] = False
    if tokenizer.unk_id is not None:
        predicted_N &= side.ids_N != tokenizer.unk_id
    return predicted_N


def _placed(side: FlatTokens, span: tuple[Ints, Ints], tokenizer: Tokenizer, start_B: Ints) -> Placed:
    (start_N, end_N), N = span, len(side.ids_N)
    document_N = np.repeat(np.arange(len(side.length_B)), side.length_B)
    text_N, index_N = ~side.special_N & (end_N >= 0), np.arange(N)
    # whose bytes a token's bits go to: its own, or those of the next token that has some
    owner_N = np.minimum.accumulate(np.where(text_N & (end_N > start_N), index_N, N)[::-1])[::-1]
    is_owned_N = owner_N < N
    owner_N = np.where(is_owned_N, owner_N, 0)
    is_owned_N &= text_N & (document_N[owner_N] == document_N if N else False)
    is_spoiled = np.zeros(N, np.bool_)
    is_spoiled[owner_N[is_owned_N & ~predicted(side, tokenizer)]] = True
    first_N = start_B[document_N] if N else np.zeros(0, np.int64)
    return Placed(
        np.where(is_owned_N, start_N[owner_N] + first_N, 0) if N else first_N,
        np.where(is_owned_N, end_N[owner_N] + first_N, 0) if N else first_N,
        is_owned_N & ~is_spoiled[owner_N] if N else np.zeros(0, np.bool_),
    )
