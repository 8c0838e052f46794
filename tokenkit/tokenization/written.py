"""What a tokenizer writes: of the tokens with the same bytes the one, of the characters those that it can.

Some vocabularies lack bytes, and have no unknown token: text is then left out, or written without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np

from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.tokenizer import Tokenizer, canonical_text

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer


def ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the ordinary token of each byte string.

    Where several tokens have the same bytes (a character of Gemma and its byte piece) it is the one that
    the tokenizer writes: the others were never trained.
    """
    result: dict[bytes, int] = {}
    repeated: dict[bytes, str] = {}
    for token_id in np.flatnonzero(~tokenizer.is_special_V & (tokenizer.byte_length_V > 0)).tolist():
        raw = tokenizer.token_bytes[token_id]
        if raw in result:
            repeated[raw] = raw.decode("utf-8", errors="ignore")
        result[raw] = token_id
    encoded = tokenizer.try_encode_batch(list(repeated.values()), before="text")
    for raw, tokens in zip(repeated, encoded, strict=True):
        if tokens is not None and len(tokens.ids) == 1 and tokenizer.token_bytes[tokens.ids[0]] == raw:
            result[raw] = int(tokens.ids[0])
    return result


Unencodable = Literal["skip", "drop", "replace"]
"""What becomes of a document with such a character: it is left out, or the characters are."""

REPLACEMENTS = "\ufffd?"  # the first that all tokenizers can write

_writes: WeakKeyDictionary[Tokenizer, dict[str, bool]] = WeakKeyDictionary()


def check_unencodable(value: str) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: it is none of `Unencodable`.
    """
    if value not in get_args(Unencodable):
        raise ValueError(f"unencodable is one of {', '.join(get_args(Unencodable))}: got {value!r}")


def writable_text(
    text: str, tokenizers: Sequence[Tokenizer], unencodable: Unencodable = "drop"
) -> tuple[str, int]:
    """Return the canonical text without the characters that some tokenizer cannot write, and their number.

    Raises:
        ValueError: text that is not valid Unicode, or has no canonical form.
    """
    text = canonical_text(text, *tokenizers)
    lacking = {c for c in set(text) if not all(_can_write(c, tokenizer) for tokenizer in tokenizers)}
    if not lacking:
        return text, 0
    mark = ""
    if unencodable == "replace":
        mark = next((c for c in REPLACEMENTS if all(_can_write(c, t) for t in tokenizers)), "")
    number = sum(text.count(character) for character in lacking)
    return canonical_text(text.translate({ord(c): mark for c in lacking}), *tokenizers), number


def writable_document(
    document: Document, tokenizers: Sequence[Tokenizer], unencodable: Unencodable
) -> tuple[Document, int]:
    """Return a document of `writable_text`, and the number of characters that were taken out.

    Raises:
        ValueError: as `writable_text`, or nothing is left.
    """
    number = 0

    def written(text: str) -> str:
        nonlocal number
        text, lacking = writable_text(text, tokenizers, unencodable)
        number += lacking
        return text

    if document.text is not None:
        return replace(document, text=written(document.text)), number
    messages = tuple(
        replace(
            message,
            content=written(message.content),
            reasoning=None if message.reasoning is None else written(message.reasoning),
        )
        for message in document.messages or ()
    )
    return replace(document, messages=messages), number


def _can_write(character: str, tokenizer: Tokenizer) -> bool:
    known = _writes.setdefault(tokenizer, {})
    if character not in known:
        # what alone is changed (a space that is stripped) was looked at as a part of the canonical text
        is_changed = tokenizer.normalize(character) != character
        known[character] = is_changed or tokenizer.try_encode_batch([character], "text")[0] is not None
    return known[character]
