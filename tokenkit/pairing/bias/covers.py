"""What a token rules out: the continuations that its tokenizer would have written with another token.

    t = "the"     c = "re"     the text "there" is the token [there], not [the][re]: c is covered

The cover of a token t is the set of continuations c (bytes, not empty) for which the last token of the text
t + c begins inside t and holds all of c. That token is b = s + c for a suffix s of t; what stands before s
is written as it would be alone.

Testing every b for every suffix of every token takes tens of millions of calls. Instead a Unigram's scores
decide (`pairing/bias/unigram.py`), and for BPE:

1. s is all of t: the text is b itself, so b counts if the tokenizer writes it as one token.
2. s is shorter: b counts if it may follow the last token of what stands before (`pairing/bias/merges.py`), as
   long as the pre-tokenizer leaves the text in one piece, or if the pre-tokenizer cuts in front of b.

Where a pre-tokenizer cuts depends on the kinds of characters alone, so it is asked once for each pair of
signatures, strings in which a stands for any lower-case letter, 1 for any digit and so on. Texts with
apostrophes (whose cuts depend on the letters) and with parts of characters go through the tokenizer itself.
Bytes that are no UTF-8 are written by the model alone.

Dimensions: V vocabulary, E entries of all covers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenkit.pairing.bias.merges import DOUBT, YES, Merges
from tokenkit.pairing.bias.signatures import IN_FRONT, INSIDE, UNKNOWN, WHOLE, Signatures
from tokenkit.pairing.bias.unigram import ByScores, is_predictable
from tokenkit.pairing.bias.writing import ByWriting, Ids, Lexicon, Writer
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.vocabulary import plain_text_document


@dataclass(frozen=True, slots=True)
class Covers:
    """The covers of all tokens of a vocabulary, end to end."""

    offset_V: NDArray[np.int64]
    """[V + 1] the cover of token t is entries offset[t] to offset[t + 1], end exclusive."""
    token_E: Ids
    """The token b that would have been written; its unigram probability weighs the entry."""
    inside_E: NDArray[np.uint16]
    """How many bytes of b lie inside t: the continuation is what is behind them."""


def find_covers(
    tokenizer: Tokenizer, kept: Container[bytes] | None = None, *, asks_always: bool = False
) -> Covers:
    """Return the cover of every text token that is not whitespace alone; all others have none.

    Args:
        tokenizer: whose tokens are meant. Tokens with the same bytes have the same cover.
        kept: no other continuations are looked at (`pairing/bias/rare.py`); None: all are.
        asks_always: ask the tokenizer for every candidate: the same covers, slowly.
    """
    writer = Writer(tokenizer)
    vocabulary = Lexicon(tokenizer, kept)
    texts = [text for text in vocabulary.texts if not text.isspace()]
    last_of = dict(zip(texts, writer.last_tokens(texts), strict=True))  # tokens the tokenizer itself writes
    tests: _ByMerges | ByScores | ByWriting = ByWriting(writer, vocabulary)
    if not asks_always:
        tests = _fastest(tokenizer, writer, vocabulary, texts) or tests
    found: dict[bytes, list[tuple[int, Ids]]] = {}
    for text in texts:
        longer_E = vocabulary.extensions(text)
        written = [last_of.get(vocabulary.bytes_of(b)) == b for b in longer_E.tolist()]
        found[text] = [(len(text), longer_E[np.array(written, bool)])]
        found[text] += tests.covered(text)
    tests.settle(found)
    return _laid_out(found, tokenizer)


def _fastest(
    tokenizer: Tokenizer, writer: Writer, vocabulary: Lexicon, texts: Sequence[bytes]
) -> _ByMerges | ByScores | None:
    """Return what decides without asking; None for models and pipelines that are not known well enough."""
    if tokenizer.document["model"]["type"] == "BPE" and tokenizer.document["model"].get("merges"):
        return _ByMerges(tokenizer, writer, vocabulary, texts)
    return ByScores(tokenizer, writer, vocabulary) if is_predictable(tokenizer) else None


def _laid_out(found: Mapping[bytes, Sequence[tuple[int, Ids]]], tokenizer: Tokenizer) -> Covers:
    """Lay the covers of all ids end to end."""
    parts_V = [
        () if tokenizer.is_special_V[token_id] else found.get(text, ())
        for token_id, text in enumerate(tokenizer.token_bytes)
    ]
    parts = [part for parts in parts_V for part in parts]
    lengths = np.array([len(token_E) for _, token_E in parts], np.int64)
    length_V = [sum(len(token_E) for _, token_E in parts) for parts in parts_V]
    return Covers(
        offset_V=np.concatenate([[0], np.cumsum(length_V, dtype=np.int64)]),
        token_E=np.concatenate([np.zeros(0, np.int32), *(token_E for _, token_E in parts)]),
        inside_E=np.repeat(np.array([inside for inside, _ in parts], np.uint16), lengths),
    )


class _ByMerges:
    """Candidates of a BPE are decided by its merges, where its pre-tokenizer lets them."""

    def __init__(
        self, tokenizer: Tokenizer, writer: Writer, vocabulary: Lexicon, texts: Sequence[bytes]
    ) -> None:
        self.vocabulary, self.writer = vocabulary, writer
        self.by_writing = ByWriting(writer, vocabulary)
        self.merges = Merges(plain_text_document(tokenizer.document)["model"])
        self.signatures = Signatures(tokenizer, writer)
        heads = sorted({text[:cut] for text in texts for cut in range(1, len(text))})
        last_tokens = Writer(tokenizer, by_merges_alone=True).last_tokens(heads)
        self.last_of_head = dict(zip(heads, last_tokens, strict=True))
        written = dict(zip(texts, writer.last_tokens(texts), strict=True))
        self.is_written_V = np.array(
            [written.get(text) == token_id for token_id, text in enumerate(tokenizer.token_bytes)], np.bool_
        )
        self.sign_V = np.array([self.signatures.of(text) for text in tokenizer.token_bytes], np.int64)
        self._valid: dict[tuple[int, bytes], NDArray[np.int8]] = {}
        self._may_follow: dict[tuple[int, int], NDArray[np.int8]] = {}
        self._takes_whole = bool(tokenizer.document["model"].get("ignore_merges"))

    def covered(self, text: bytes) -> Iterable[tuple[int, Ids]]:
        """Return what begins inside `text`, behind its first byte."""
        result = []
        for cut in range(1, len(text)):
            token_E = self.vocabulary.extensions(text[cut:])
            if not len(token_E):
                continue
            head = text[:cut]
            sign = self.signatures.of(head)
            if sign == UNKNOWN or self.signatures.is_cut(head):
                self.by_writing.ask(text, cut, token_E)
                continue
            sign_E = self.sign_V[token_E]
            place_E = self.signatures.last_piece(sign, sign_E)
            is_one_E, is_cut_E = place_E == WHOLE, place_E == IN_FRONT
            follows_E = self._follows(self.last_of_head[head], text[cut:], token_E)
            kept_E = (is_one_E & (follows_E == YES)) | (is_cut_E & self.is_written_V[token_E])
            unknown_E = (sign_E == UNKNOWN) | (place_E == INSIDE) | (is_one_E & (follows_E == DOUBT))
            if unknown_E.any():
                self.by_writing.ask(text, cut, token_E[unknown_E])
                kept_E &= ~unknown_E
            if kept_E.any():
                result.append((len(text) - cut, token_E[kept_E]))
        return result

    def settle(self, found: dict[bytes, list[tuple[int, Ids]]]) -> None:
        """Add what the tokenizer said; a piece that is a token needs no merges where the model says so."""
        self.by_writing.settle(found)
        if self._takes_whole:
            for text, parts in found.items():
                whole = [
                    self.vocabulary.bytes_of(b) for b in parts[0][1].tolist() if not self.merges.is_made(b)
                ]
                if whole:
                    parts[1:] = [self._without(part, {b[len(text) :] for b in whole}) for part in parts[1:]]

    def _without(self, part: tuple[int, Ids], continuations: set[bytes]) -> tuple[int, Ids]:
        inside, token_E = part
        kept_E = [self.vocabulary.bytes_of(b)[inside:] not in continuations for b in token_E.tolist()]
        return inside, token_E[np.array(kept_E, np.bool_)]

    def _follows(self, last: int, suffix: bytes, token_E: Ids) -> NDArray[np.int8]:
        """Return for each of a suffix's extensions whether it may follow `last`: NO, YES or DOUBT."""
        known = self._valid.get((last, suffix))
        if known is None:
            place_E = self.merges.place_V[token_E]
            known = np.zeros(len(token_E), np.int8)
            if (place_E >= 0).any():
                root = self.merges.root_of(int(token_E[(place_E >= 0).argmax()]))
                begin, end = self.merges.root_places(root)
                may = self._may_follow.get((last, root))
                if may is None:
                    may = self._may_follow[last, root] = self.merges.may_follow(last, root)
                here_E = (place_E >= begin) & (place_E < end)
                known[here_E] = may[place_E[here_E] - begin]
            self._valid[last, suffix] = known
        return known
