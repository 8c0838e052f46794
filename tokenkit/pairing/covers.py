"""What a token rules out: the continuations that its tokenizer would have written with another token.

    t = "the"     c = "re"     the text "there" is the token [there], not [the][re]: c is covered

The cover of a token t is the set of continuations c (bytes, not empty) for which the last token of the text
t + c begins inside t and holds all of c. That token is b = s + c for a suffix s of t; what stands before s
is written as it would be alone.

Testing every b for every suffix of every token takes tens of millions of calls. Instead, for BPE:

1. s is all of t: the text is b itself, so b counts if the tokenizer writes it as one token.
2. s is shorter: b counts if it may follow the last token of what stands before (`pairing/merges.py`), as
   long as the pre-tokenizer leaves the text in one piece, or if the pre-tokenizer cuts in front of b.

Where a pre-tokenizer cuts depends on the kinds of characters alone, so it is asked once for each pair of
signatures, strings in which a stands for any lower-case letter, 1 for any digit and so on. Texts with
apostrophes (whose cuts depend on the letters), with parts of characters, and all texts of other models
than BPE go through the tokenizer itself. Bytes that are no UTF-8 are written by the model alone.

Dimensions: V vocabulary, E entries of all covers.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tokenkit.pairing.merges import DOUBT, YES, Merges
from tokenkit.tokenization.backend import Backend
from tokenkit.tokenization.byteify import Tokenizer
from tokenkit.tokenization.vocabulary import BYTE_ALPHABET, plain_text_document

Ids = NDArray[np.int32]
BLOCK = 100_000  # texts that go to the tokenizer at once
UNKNOWN = -1  # signature of a token that holds an apostrophe, or parts of characters


@dataclass(frozen=True, slots=True)
class Covers:
    """The covers of all tokens of a vocabulary, end to end."""

    offset_V: NDArray[np.int64]
    """[V + 1] the cover of token t is entries offset[t] to offset[t + 1], end exclusive."""
    token_E: Ids
    """The token b that would have been written; its unigram probability weighs the entry."""
    inside_E: NDArray[np.uint16]
    """How many bytes of b lie inside t: the continuation is what is behind them."""


def find_covers(tokenizer: Tokenizer, kept: Container[bytes] | None = None) -> Covers:
    """Return the cover of every text token that is not whitespace alone; all others have none.

    Tokens with the same bytes have the same cover. BPE is fast; for any other model the tokenizer is called
    for every candidate. With `kept` no other continuations are looked at (`pairing/rare.py`).
    """
    writer = Writer(tokenizer)
    vocabulary = _Lexicon(tokenizer, kept)
    texts = [text for text in vocabulary.texts if not text.isspace()]
    last_of = dict(zip(texts, writer.last_tokens(texts), strict=True))  # tokens the tokenizer itself writes
    tests: _ByMerges | _ByWriting
    if tokenizer.document["model"]["type"] == "BPE" and tokenizer.document["model"].get("merges"):
        tests = _ByMerges(tokenizer, writer, vocabulary, texts)
    else:
        tests = _ByWriting(writer, vocabulary)
    found: dict[bytes, list[tuple[int, Ids]]] = {}
    for text in texts:
        longer_E = vocabulary.extensions(text)
        written = [last_of.get(vocabulary.bytes_of(b)) == b for b in longer_E.tolist()]
        found[text] = [(len(text), longer_E[np.array(written, bool)])]
        found[text] += tests.covered(text)
    tests.settle(found)
    return _laid_out(found, tokenizer)


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


class _Lexicon:
    """The text tokens of a vocabulary, by their bytes."""

    def __init__(self, tokenizer: Tokenizer, kept: Container[bytes] | None) -> None:
        self.token_bytes, self.kept = tokenizer.token_bytes, kept
        pairs = sorted(
            (text, token_id)
            for token_id, text in enumerate(tokenizer.token_bytes)
            if text and not tokenizer.is_special_V[token_id]
        )
        self._text_of_place = [text for text, _ in pairs]
        self._id_of_place = np.array([token_id for _, token_id in pairs], np.int32)
        self.texts = sorted(set(self._text_of_place))
        self._extensions: dict[bytes, Ids] = {}

    def bytes_of(self, token_id: int) -> bytes:
        return self.token_bytes[token_id]

    def extensions(self, text: bytes) -> Ids:
        """Return the tokens that begin with `text` and are longer, if what is behind it is kept."""
        known = self._extensions.get(text)
        if known is None:
            begin = bisect_right(self._text_of_place, text)
            end = bisect_left(
                self._text_of_place, True, lo=begin, key=lambda other: not other.startswith(text)
            )
            known = self._id_of_place[begin:end]
            if self.kept is not None:
                rests = (longer[len(text) :] for longer in self._text_of_place[begin:end])
                known = known[np.array([rest in self.kept for rest in rests], np.bool_)]
            self._extensions[text] = known
        return known


class Writer:
    """Writes bytes as token ids, as they would be written in the middle of a text."""

    def __init__(self, tokenizer: Tokenizer, *, by_merges_alone: bool = False) -> None:
        document = plain_text_document(tokenizer.document)
        if by_merges_alone:  # no piece is a token just because the vocabulary holds it
            document["model"] = dict(document["model"], ignore_merges=False)
        backend = Backend(document, tokenizer.prefix, tokenizer.vocabulary.alphabet)
        self.rust = backend.writer("text").backend
        self.is_byte_level = tokenizer.vocabulary.alphabet == "byte-level"

    def last_tokens(self, texts: Sequence[bytes]) -> list[int]:
        """Return the last token of each; -1 where the tokenizer cannot write it."""
        result = [-1] * len(texts)
        places, strings = [], []
        for place, text in enumerate(texts):
            string = _decoded(text)
            if string is not None:
                places.append(place)
                strings.append(string)
            elif self.is_byte_level:
                tokens = self.rust.model.tokenize("".join(BYTE_ALPHABET[byte] for byte in text))
                result[place] = tokens[-1].id if tokens else -1
        for start in range(0, len(strings), BLOCK):
            encoded = self.rust.encode_batch_fast(strings[start : start + BLOCK], add_special_tokens=False)
            for place, encoding in zip(places[start : start + BLOCK], encoded, strict=True):
                ids = encoding.ids
                result[place] = ids[-1] if ids else -1
        return result

    def last_piece(self, text: str) -> int:
        """Return where the last piece of the pre-tokenizer begins, in characters of `text`."""
        if self.rust.pre_tokenizer is None:
            return 0
        pieces = self.rust.pre_tokenizer.pre_tokenize_str(text)
        return pieces[-1][1][0] if pieces else 0


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


class _ByWriting:
    """Every candidate goes through the tokenizer: exact for any model."""

    def __init__(self, writer: Writer, vocabulary: _Lexicon) -> None:
        self.writer, self.vocabulary = writer, vocabulary
        self._pending: list[tuple[bytes, int, int]] = []
        self._kept: dict[tuple[bytes, int], list[int]] = defaultdict(list)

    def covered(self, text: bytes) -> Iterable[tuple[int, Ids]]:
        """Take all candidates of a token down; `settle` decides."""
        for cut in range(1, len(text)):
            self.ask(text, cut, self.vocabulary.extensions(text[cut:]))
        return ()

    def ask(self, text: bytes, cut: int, token_E: Ids) -> None:
        """Take down that these tokens may begin at `cut`."""
        self._pending += [(text, cut, b) for b in token_E.tolist()]
        if len(self._pending) >= BLOCK:
            self._write()

    def settle(self, found: dict[bytes, list[tuple[int, Ids]]]) -> None:
        """Add what the tokenizer said."""
        self._write()
        for (text, cut), tokens in self._kept.items():
            found[text].append((len(text) - cut, np.array(tokens, np.int32)))

    def _write(self) -> None:
        words = [text[:cut] + self.vocabulary.bytes_of(b) for text, cut, b in self._pending]
        for (text, cut, b), last in zip(self._pending, self.writer.last_tokens(words), strict=True):
            if last == b:
                self._kept[text, cut].append(b)
        self._pending = []


class _ByMerges:
    """Candidates of a BPE are decided by its merges, where its pre-tokenizer lets them."""

    def __init__(
        self, tokenizer: Tokenizer, writer: Writer, vocabulary: _Lexicon, texts: Sequence[bytes]
    ) -> None:
        self.vocabulary, self.writer = vocabulary, writer
        self.by_writing = _ByWriting(writer, vocabulary)
        self.merges = Merges(plain_text_document(tokenizer.document)["model"])
        self.signatures = _Signatures(tokenizer, writer)
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


WHOLE, IN_FRONT, INSIDE, ELSEWHERE = 0, 1, 2, 3


class _Signatures:
    """Kinds of characters in place of characters: what a pre-tokenizer looks at."""

    def __init__(self, tokenizer: Tokenizer, writer: Writer) -> None:
        self.writer = writer
        self._number: dict[str, int] = {}
        self._strings: list[str] = []
        self._of: dict[bytes, int] = {}
        self._pieces: dict[tuple[int, int], int] = {}
        self._is_exact_beyond_ascii = tokenizer.document.get("normalizer") is None
        self._added = [text.decode() for text in _added_texts(tokenizer)]
        self._added_heads = {text[:n] for text in self._added for n in range(1, len(text))}

    def of(self, text: bytes) -> int:
        """Return the number of a text's signature; UNKNOWN: only the tokenizer itself can tell."""
        known = self._of.get(text)
        if known is None:
            known = self._of[text] = self._sign(text)
        return known

    def is_cut(self, head: bytes) -> bool:
        """Whether the pre-tokenizer cuts a text by itself: its last token then depends on what follows."""
        return self.writer.last_piece(head.decode()) != 0

    def last_piece(self, sign: int, sign_E: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the last piece of head + token begins: WHOLE (no cut at all), IN_FRONT of the token,
        INSIDE the head, or ELSEWHERE, inside the token."""
        unique, back_E = np.unique(sign_E, return_inverse=True)
        return np.array([self._where(sign, other) for other in unique.tolist()], np.int64)[back_E]

    def _where(self, sign: int, other: int) -> int:
        if other == UNKNOWN:
            return ELSEWHERE
        known = self._pieces.get((sign, other))
        if known is None:
            head = self._strings[sign]
            begin = self.writer.last_piece(head + self._strings[other])
            known = WHOLE if begin == 0 else IN_FRONT if begin == len(head) else INSIDE
            known = self._pieces[sign, other] = known if begin <= len(head) else ELSEWHERE
        return known

    def _sign(self, text: bytes) -> int:
        string = _decoded(text)
        if string is None or "'" in string or "\u2019" in string:
            return UNKNOWN
        if not (string.isascii() or (self._is_exact_beyond_ascii)) and not _is_stable(string):
            return UNKNOWN
        if any(added in string for added in self._added) or any(
            string[-n:] in self._added_heads for n in range(1, len(string) + 1)
        ):
            return UNKNOWN
        string = _RUN.sub(r"\1\1\1", "".join(map(_kind, string)))
        if string not in self._number:
            self._number[string] = len(self._strings)
            self._strings.append(string)
        return self._number[string]


_RUN = re.compile(r"(\D)\1{3,}")
_KINDS: dict[tuple[str, str], str] = {}


@cache
def _kind(character: str) -> str:
    """Return a character of the same kind: category and, beyond ASCII, script."""
    if character.isascii():
        if character.isalpha():
            return "a" if character.islower() else "A"
        return "1" if character.isdigit() else character
    script = unicodedata.name(character, "").split(" ")[0]
    return _KINDS.setdefault((unicodedata.category(character), script), character)


def _is_stable(string: str) -> bool:
    """Whether no normalizer composes these characters with neighbours or changes them."""
    return all(
        not unicodedata.category(c).startswith("M")
        and not 0x1100 <= ord(c) < 0x1200
        and unicodedata.normalize("NFKC", c) == c
        for c in string
    )


def _added_texts(tokenizer: Tokenizer) -> list[bytes]:
    added = plain_text_document(tokenizer.document)["added_tokens"]
    return [token["content"].encode() for token in added]
