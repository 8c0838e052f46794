"""The tokenizers library behind a `Tokenizer`: one Rust tokenizer for each place that a text can stand in.

Some tokenizers put a space in front of text, and a text inside a document must do without it:

prepend     SentencePiece BPE (Llama 2): always, even where the text begins with a space
metaspace   SentencePiece as a pre-tokenizer (T5): unless the text begins with a space
byte-level  RoBERTa-like: unless the text begins with a space
manual      the spec said so: the backend adds none, and `Tokenizer` writes one in front
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import tokenizers

from tokenkit.tokenization.vocabulary import METASPACE, Alphabet, plain_text_document, spell

Scheme = Literal["never", "first", "always"]


@dataclass(frozen=True)
class Prefix:
    """When a space is put in front, and by whom."""

    scheme: Scheme = "never"
    """`first`: only at the very start of a document; `always`: also after each special token."""
    even_before_space: bool = False
    is_manual: bool = False
    is_removable: bool = True
    """False where every word gets its space this way (Metaspace after WhitespaceSplit)."""


def find_prefix(document: Mapping[str, Any]) -> Prefix:
    """Read from a parsed tokenizer.json whether its pipeline puts a space in front of text."""
    normalizers = _flat(document.get("normalizer"), "normalizers")
    if any(part["type"] == "Prepend" and part.get("prepend") in (METASPACE, " ") for part in normalizers):
        return Prefix("always", even_before_space=True)
    parts = _flat(document.get("pre_tokenizer"), "pretokenizers")
    is_removable = not any(part["type"].startswith("Whitespace") for part in parts)
    for part in parts:
        if part["type"] == "Metaspace":
            scheme: Scheme = part.get("prepend_scheme") or (
                "always" if part.get("add_prefix_space") else "never"
            )
            return Prefix(scheme, is_removable=is_removable)
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return Prefix("always", is_removable=is_removable)
    return Prefix()


def without_prefix(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json whose pipeline puts no space in front of text."""
    normalizers = [
        part for part in _flat(document.get("normalizer"), "normalizers") if part["type"] != "Prepend"
    ]
    parts = []
    for part in _flat(document.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace":
            part = {**part, "prepend_scheme": "never", "add_prefix_space": False}
        elif part["type"] == "ByteLevel":
            part = {**part, "add_prefix_space": False}
        parts.append(part)
    return {
        **document,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts} if parts else None,
    }


def with_prepended_space(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json that puts a space in front of all text: what a manual prefix saves as."""
    if find_prefix(document).scheme != "never":
        return dict(document)
    normalizers = [{"type": "Prepend", "prepend": " "}, *_flat(document.get("normalizer"), "normalizers")]
    return {**document, "normalizer": {"type": "Sequence", "normalizers": normalizers}}


def _flat(part: Any, key: str) -> list[dict[str, Any]]:
    """Return the members of a (nested) Sequence as one list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [leaf for member in part[key] for leaf in _flat(member, key)]
    return [part]


Before = Literal["start", "special", "text", "space"]
"""What stands before a text: the start of the document, a special token, other text, or a template's space
that the text takes over (`[INST] ` followed by `Hi` is written `[INST]` and ` Hi`)."""


class Writer(NamedTuple):
    """How a text is handed to the tokenizers library."""

    backend: tokenizers.Tokenizer
    lead: str
    """Written in front of the text."""
    adds_space: bool
    """The backend puts a space in front by itself."""


class Backend:
    """The Rust tokenizers of one tokenizer.json, to which all text is text (`plain_text_document`)."""

    prefix: Prefix
    """The space that is put in front of text."""

    def __init__(self, document: Mapping[str, Any], alphabet: Alphabet, *, is_manual: bool = False) -> None:
        """Build the tokenizer for the start of a document; the others are built when asked for."""
        self.alphabet = alphabet
        self.prefix = find_prefix(document)
        if is_manual:
            self.prefix = Prefix("always", even_before_space=True, is_manual=True)
        self._plain = plain = plain_text_document(document)
        self._first = build(without_prefix(plain) if is_manual else plain)
        for token in plain["added_tokens"]:
            if self._first.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"added token {token['content']!r} does not keep its id {token['id']}")

    def writer(self, before: Before) -> Writer:
        """Return how a text in this place is written."""
        adds_space = self.prefix.scheme != "never" and not self.prefix.is_manual
        as_is = Writer(self._first, " " if self.prefix.is_manual else "", adds_space)
        if before == "start" or (before == "special" and self.prefix.scheme == "always"):
            return as_is
        if not self.prefix.is_removable or (before == "space" and self.prefix.even_before_space):
            return as_is
        return Writer(self._unprefixed, " " if before == "space" else "", adds_space=False)

    def encode_with_offsets(self, text: str, writer: Writer) -> tokenizers.Encoding:
        """Encode one text, where the offsets of its tokens (characters) are needed."""
        with _no_panic("a text"):
            return writer.backend.encode(writer.lead + text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str], before: Before) -> tuple[Writer, list[tokenizers.Encoding]]:
        """Encode many texts that stand in such a place, on all cores; return how they were written too.

        Raises:
            ValueError: the library gave up on one of them.
        """
        writer = self.writer(before)
        written = [writer.lead + text for text in texts] if writer.lead else texts
        with _no_panic("a text"):
            return writer, writer.backend.encode_batch_fast(written, add_special_tokens=False)

    def normalize(self, text: str) -> str | None:
        """Return, as text, what the model gets to see; None where that is not UTF-8."""
        normalizer, pre_tokenizer = self._first.normalizer, self._first.pre_tokenizer
        with _no_panic("a text"):
            if normalizer:
                text = normalizer.normalize_str(text)
            starts_with_space = text.startswith((" ", METASPACE))
            if pre_tokenizer:
                text = "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
        if self.alphabet == "byte-level":
            decoded = spell(text)
            if decoded is None:
                return None
            text = decoded
        elif self.alphabet == "metaspace":
            text = text.replace(METASPACE, " ")
        writes_space = self.prefix.scheme != "never" and not self.prefix.is_manual
        if writes_space and (self.prefix.even_before_space or not starts_with_space):
            text = text.removeprefix(" ")
        return text

    @cached_property
    def _unprefixed(self) -> tokenizers.Tokenizer:
        """The tokenizer that puts no space in front of text."""
        if self.prefix.scheme == "never" or self.prefix.is_manual:
            return self._first
        return build(without_prefix(self._plain))


def build(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build a Rust tokenizer from a parsed tokenizer.json.

    Raises:
        ValueError: the library refuses it.
    """
    try:
        with _no_panic("the tokenizer.json"):
            return tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
    except RecursionError:
        raise
    except Exception as error:  # the library raises Exception itself, nothing narrower
        raise ValueError(f"the tokenizers library refuses the tokenizer.json: {error}") from error


@contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Turn a panic of the library, which is no Exception, into an error: its patterns give up so."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library gave up on {what}: {error}") from error
