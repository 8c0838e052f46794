"""The beginning of a long document: as much as decides on its first tokens.

A tokenizer reads all of a text before any of it is known to be cut off. Only the first tokens are kept, so
a long document is first cut to a multiple of them. What stands behind a cut may change tokens in front of it
(a word that ends elsewhere, letters that are composed), and no rule says how far. So the document is cut
twice, the second time twice as far behind: where both give the same first tokens, the text that only one of
them saw does not matter; where they differ, more of it is read, in the end all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.ragged import FlatTokens, split

CHARACTERS = 16  # of the first cut, for each token that is wanted: 3 to 5 are usual
_LEAST = 2048  # characters of the first cut
_WORTH = 4  # times the first cut: a shorter document is read whole

Encode = Callable[[list[Document]], Sequence[FlatTokens]]


def beginning(document: Document, lengths: Sequence[int], encode: Encode) -> Document:
    """Return a document with the same first tokens, of which less has to be read.

    Args:
        document: of any length.
        lengths: tokens that are kept of each side.
        encode: gives the sides of some documents.
    """
    size = max(_LEAST, CHARACTERS * max(lengths))
    total = _size(document)
    while _WORTH * size <= total:
        try:
            longer = _cut(document, 2 * size)
            if _begin_alike(encode([_cut(document, size), longer]), lengths):
                return longer
        except ValueError:  # nothing but whitespace, or text that cannot be written: all of it decides
            return document
        size *= 4
    return document


def _begin_alike(sides: Sequence[FlatTokens], lengths: Sequence[int]) -> bool:
    for side, length in zip(sides, lengths, strict=True):
        first, second = split(side)
        if min(len(first.ids), len(second.ids)) <= length:
            return False
        for name in ("ids", "byte_ends", "special", "trained"):
            if not np.array_equal(getattr(first, name)[:length], getattr(second, name)[:length]):
                return False
    return True


def _size(document: Document) -> int:
    if document.text is not None:
        return len(document.text)
    return sum(len(message.content) for message in document.messages or ())


def _cut(document: Document, size: int) -> Document:
    """Keep so many characters, and of each later message a few: what stands around them stays."""
    if document.text is not None:
        return replace(document, text=document.text[:size])
    messages, left = [], size
    for message in document.messages or ():
        messages.append(replace(message, content=message.content[: max(left, 1)]))
        left = max(left - len(message.content), 0)
    return replace(document, messages=tuple(messages))
