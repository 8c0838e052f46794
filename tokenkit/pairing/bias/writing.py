"""What a tokenizer writes last: asked of the tokenizer itself, for every candidate."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tokenkit.tokenization.backend import Backend
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.vocabulary import BYTE_ALPHABET

Ids = NDArray[np.int32]
BLOCK = 100_000  # texts that go to the tokenizer at once


class Lexicon:
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
        """Return the bytes of a token."""
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
        document = dict(tokenizer.document)
        if by_merges_alone:  # no piece is a token just because the vocabulary holds it
            document["model"] = dict(document["model"], ignore_merges=False)
        alphabet, is_manual = tokenizer.vocabulary.alphabet, tokenizer.prefix.is_manual
        backend = Backend(document, alphabet, is_manual=is_manual)
        self.rust = backend.writer("text").backend
        self.is_byte_level = tokenizer.vocabulary.alphabet == "byte-level"

    def last_tokens(self, texts: Sequence[bytes]) -> list[int]:
        """Return the last token of each; -1 where the tokenizer cannot write it."""
        result = [-1] * len(texts)
        places, strings = [], []
        for place, text in enumerate(texts):
            string = decoded(text)
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


def decoded(text: bytes) -> str | None:
    """Return bytes as text; None if they are no UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


class ByWriting:
    """Every candidate goes through the tokenizer: exact for any model."""

    def __init__(self, writer: Writer, vocabulary: Lexicon) -> None:
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
