"""Kinds of characters in place of characters: where a pre-tokenizer cuts depends on them alone."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tokenkit.pairing.bias.writing import Writer, decoded
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.vocabulary import METASPACE, plain_text_document

UNKNOWN = -1  # signature of a text that holds an apostrophe, or parts of characters
WHOLE, IN_FRONT, INSIDE, ELSEWHERE = 0, 1, 2, 3


class Signatures:
    """Kinds of characters in place of characters: what a pre-tokenizer looks at."""

    def __init__(self, tokenizer: Tokenizer, writer: Writer) -> None:
        self.writer = writer
        self._number: dict[str, int] = {}
        self._strings: list[str] = []
        self._of: dict[bytes, int] = {}
        self._pieces: dict[tuple[int, int], int] = {}
        self._is_exact_beyond_ascii = tokenizer.document.get("normalizer") is None
        self._added = _added_texts(tokenizer, writer)
        self._added_heads = {text[:n] for text in self._added for n in range(1, len(text))}

    def of(self, text: bytes) -> int:
        """Return the number of a text's signature; UNKNOWN: only the tokenizer itself can tell."""
        known = self._of.get(text)
        if known is None:
            known = self._of[text] = self._sign(text)
        return known

    def string(self, number: int) -> str:
        """Return a signature as text."""
        return self._strings[number]

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
        string = decoded(text)
        if string is None or "'" in string or "\u2019" in string:
            return UNKNOWN
        if not (string.isascii() or (self._is_exact_beyond_ascii)) and not is_stable(string):
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


def is_stable(string: str) -> bool:
    """Whether no normalizer composes these characters with neighbours or changes them."""
    return all(
        not unicodedata.category(c).startswith("M")
        and not 0x1100 <= ord(c) < 0x1200
        and unicodedata.normalize("NFKC", c) == c
        for c in string
    )


def _added_texts(tokenizer: Tokenizer, writer: Writer) -> set[str]:
    """Return what is cut out of a text as an added token; some of it is looked for behind the normalizer."""
    contents = {token["content"] for token in plain_text_document(tokenizer.document)["added_tokens"]}
    if writer.rust.normalizer is not None:
        contents |= {writer.rust.normalizer.normalize_str(content) for content in contents}
    return contents | {content.replace(METASPACE, " ") for content in contents}
