"""The tokenizers library behind a `Tokenizer`: one Rust tokenizer for each place that a text can stand in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import tokenizers

from tokenkit.tokenization.dummy_space import Prefix, without_prefix
from tokenkit.tokenization.vocabulary import METASPACE, Alphabet, spell

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
    """The Rust tokenizers of one plain-text tokenizer.json (`vocabulary.plain_text_document`)."""

    def __init__(self, plain: Mapping[str, Any], prefix: Prefix, alphabet: Alphabet) -> None:
        """Build the tokenizer for the start of a document; the others are built when asked for."""
        self.prefix, self.alphabet = prefix, alphabet
        self._plain = plain
        self._first = build(without_prefix(plain) if prefix.is_manual else plain)
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

    def encode_batch(self, texts: Sequence[str], writer: Writer) -> list[tokenizers.Encoding]:
        """Encode many texts, on all cores.

        Raises:
            ValueError: the library gave up on one of them.
        """
        written = [writer.lead + text for text in texts] if writer.lead else texts
        with _no_panic("a text"):
            return writer.backend.encode_batch_fast(written, add_special_tokens=False)

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
