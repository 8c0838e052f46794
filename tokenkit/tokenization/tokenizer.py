"""The byte-level view of any tokenizer: text to ids, and the byte at which each token ends.

    tokenizer = load_tokenizer("Qwen/Qwen2.5-0.5B")
    tokens = tokenizer.encode("naïve </s>")     # b"".join(token_bytes[i] for i in ids) is the text

Text is nothing but text: a special token's string inside it is spelled out, never the special token.
A tokenizer that changes text before it reads it (NFC, collapsed spaces) is given text that it leaves
alone, `canonical_text`; what `encode` returns has been checked, byte by byte, to spell its argument.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenkit.structs import Tokens
from tokenkit.tokenization.backend import Backend, Before, Writer
from tokenkit.tokenization.chat.families import BYTE_FAMILY, FAMILIES, Family
from tokenkit.tokenization.chat.special_tokens import (
    byte_document,
    check_has_family,
    check_tokens_to_add,
    control_strings,
    generic_family,
    to_family,
    with_special_tokens,
)
from tokenkit.tokenization.chat.template import family_of_template, tokens_by_role
from tokenkit.tokenization.files.saving import save, to_huggingface
from tokenkit.tokenization.files.sources import read_files, read_object, well_formed
from tokenkit.tokenization.options import SPACE_BYTES, SPACE_MASK_PARTS
from tokenkit.tokenization.ragged import EncodedTexts, Ints, Speller, place_bytes, walked_texts
from tokenkit.tokenization.spec import BYTE, TokenizerSpec, parse_spec
from tokenkit.tokenization.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_ROUNDS = 8  # of normalisation, before text counts as one that never settles


class CutTexts(NamedTuple):
    """Texts that the tokenizers library has cut."""

    texts: Sequence[str]
    raw: list[bytes]
    """The texts in UTF-8."""
    writer: Writer | None
    """None: the bytes are the ids, and nothing was cut."""
    encodings: Sequence[Any]


class Tokenizer:
    """One tokenizer, seen as bytes. Made by `load_tokenizer`."""

    def __init__(
        self,
        spec: TokenizerSpec,
        document: dict[str, Any],
        family: Family,
        chat_template: str | None = None,
        tokens_to_add: Sequence[str] = (),
    ) -> None:
        """Build the view of a parsed tokenizer.json whose special tokens are those of `family`.

        It holds `tokens_to_add` already; they are named for who makes embeddings for them.
        """
        self.spec, self.family, self.chat_template, self.document = spec, family, chat_template, document
        self.vocabulary = read_vocabulary(document, prebyteified=spec.conversion == "prebyteified")
        self.token_bytes = self.vocabulary.token_bytes
        self.vocab_size = len(self.token_bytes)
        self.is_special_V: NDArray[np.bool_] = self.vocabulary.is_special_V
        self.byte_length_V: NDArray[np.int32] = self.vocabulary.lengths()
        self.control = self.vocabulary.control
        self.tokens_to_add = tuple(dict.fromkeys(tokens_to_add))
        self.bos_id, self.eos_id, self.pad_id = (
            self.control.get(family.tokens.get(role, "")) for role in ("bos", "eos", "pad")
        )
        self.unk_id = self.vocabulary.unk_id
        is_manual = spec.conversion == "manual_add_prefix_space"
        self._backend = Backend(document, self.vocabulary.alphabet, is_manual=is_manual)
        self.prefix = self._backend.prefix
        self._is_bytes = (
            self.vocabulary.alphabet == "byte-level"
            and not document["model"].get("merges")
            and document.get("normalizer") is None
            and self.prefix.scheme == "never"
            and not self.vocabulary.text_added
            and self.token_bytes[:256] == [bytes([byte]) for byte in range(256)]
        )

    def __repr__(self) -> str:
        """Name the spec, the size and the family."""
        return f"Tokenizer({str(self.spec)!r}, vocab_size={self.vocab_size}, family={self.family.name!r})"

    def encode(self, text: str) -> Tokens:
        """Return the ids of plain text and where each token ends, in bytes of the text's UTF-8.

        No special token is written, and none is read: their strings inside the text are text.

        Raises:
            ValueError: text that is not canonical, not valid Unicode, or that the vocabulary cannot spell.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Encode many texts in one call of the tokenizers library, on all cores.

        Raises:
            ValueError: as `encode`, for the first text that cannot be encoded.
        """
        encoded = self.try_encode_batch(texts)
        return [self._fail(t) if tokens is None else tokens for t, tokens in zip(texts, encoded, strict=True)]

    def encode_texts(self, texts: Sequence[str], before: Before = "start") -> EncodedTexts:
        """Encode many texts, some of which may not be spelled by their ids, byte for byte.

        Args:
            texts: canonical texts, or not: those that this tokenizer would change are not spelled.
            before: what stands before each text; decides on the space that some tokenizers put in front.

        Raises:
            ValueError: a text that is not valid Unicode.
        """
        return self.placed(self.cut_texts(texts, before))

    def cut_texts(self, texts: Sequence[str], before: Before) -> CutTexts:
        """Do the tokenizers library's part of `encode_texts`; `placed` does ours.

        Who has several calls makes all of them first: each part then finds its own data in the cache.
        """
        raw = [_utf8(text) for text in texts]
        if self._is_bytes and before != "space":
            return CutTexts(texts, raw, None, ())
        return CutTexts(texts, raw, *self._backend.encode_batch(texts, before))

    def placed(self, cut: CutTexts) -> EncodedTexts:
        """Lay out what `cut_texts` returned."""
        texts, raw, writer, encodings = cut
        if writer is None:
            return place_bytes(raw)
        ids_of_each = [encoding.ids for encoding in encodings]
        may_add_space = writer.adds_space or bool(writer.lead)
        encoded = self._speller.place(ids_of_each, raw, may_add_space=may_add_space)
        # Only these tokenizers write something else than the text's own bytes behind its first token.
        may_walk = writer.adds_space and bool(self.vocabulary.text_added)
        wrong = np.flatnonzero(~encoded.is_spelled_K).tolist()
        walked = {
            index: found
            for index in wrong
            if (may_walk or (self.unk_id is not None and self.unk_id in ids_of_each[index]))
            and (found := self._walk(texts[index], writer))
        }
        return encoded.replaced(list(walked), walked_texts(list(walked.values()))) if walked else encoded

    def try_encode_batch(self, texts: Sequence[str], before: Before = "start") -> list[Tokens | None]:
        """Encode many texts one by one; None for each that its ids do not spell. Otherwise `encode_texts`."""
        return self.encode_texts(texts, before).tokens()

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text that ids spell, without the space that the tokenizer itself put in front.

        Bytes that are not UTF-8 (a character cut in half) become U+FFFD.
        """
        kept = [i for i in ids if not (skip_special and self.is_special_V[i])]
        raw = b"".join(self.token_bytes[i] for i in kept)
        if self.prefix.scheme != "never" and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", errors="replace")

    def normalize(self, text: str) -> str:
        """Return what this tokenizer makes of text before it cuts it, as text: a fixed point.

        Raises:
            ValueError: text that is not valid Unicode, or that never settles.
        """
        _utf8(text)
        for _ in range(MAX_ROUNDS):
            normal = self._backend.normalize(text)
            if normal is None:
                raise ValueError(f"tokenizer {self.spec} makes no valid text of it: leave it out")
            if normal == text:
                return text
            text = normal
        raise ValueError(
            f"tokenizer {self.spec} has a normalizer that changes the text anew each time: leave it out"
        )

    def space_mask(self, mode: str = "space+tab+newline+special") -> NDArray[np.bool_]:
        """Return which tokens begin with whitespace, [V] bool.

        Args:
            mode: names joined by `+`: `space`, `tab`, `newline` (first byte 0x20, 0x09, 0x0A) and `special`.

        Raises:
            ValueError: an unknown name.
        """
        names = mode.split("+")
        for name in names:
            if name not in SPACE_MASK_PARTS:
                valid = ", ".join(SPACE_MASK_PARTS)
                raise ValueError(f"space_mask_mode joins {valid} with '+': got {name!r} in {mode!r}")
        first = tuple(SPACE_BYTES[name] for name in names if name != "special")
        starts_V = np.array([raw.startswith(first) for raw in self.token_bytes]) & ~self.is_special_V
        return starts_V | self.is_special_V if "special" in names else starts_V

    @cached_property
    def chat(self) -> Family:
        """The family with its turns: its own, or those of the tokenizer's chat template.

        Raises:
            ValueError: a tokenizer with neither.
        """
        if self.family.turns:
            return self.family
        if self.chat_template is None:
            raise ValueError(
                f"tokenizer {self.spec} has no chat template: name a family with ':target=', or write "
                "without one: use_chat_template=false and chat_template_mode=direct_encode"
            )
        return family_of_template(self.family, self.chat_template, self.control)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of special tokens by role (`bos`, `end_turn`, ...): the family's, and those of its turns."""
        tokens = tokens_by_role(self.family, self.chat_template, self.control)
        return {role: self.control[string] for role, string in tokens.items() if string in self.control}

    def to_huggingface(self) -> PreTrainedTokenizerFast:
        """Return the transformers tokenizer with the same ids, special tokens and chat template."""
        return to_huggingface(self)

    def save(self, folder: str | Path) -> None:
        """Write the files that `AutoTokenizer` loads.

        Raises:
            FileExistsError: the folder holds a tokenizer already.
        """
        save(self, folder)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of all that decides which ids a document gets."""
        parts = {
            "document": self.document,
            "conversion": self.spec.conversion,
            "family": repr(self.family),
            "chat_template": self.chat_template,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def meaning(self) -> str:
        """A SHA-256 (hex) of what each id stands for: its bytes, and which ids are special."""
        digest = hashlib.sha256(np.ascontiguousarray(self.byte_length_V, np.int64).tobytes())
        digest.update(b"".join(self.token_bytes))
        digest.update(np.packbits(self.is_special_V).tobytes())
        return digest.hexdigest()

    @cached_property
    def _speller(self) -> Speller:
        return Speller(self.token_bytes, self.byte_length_V)

    def _walk(self, text: str, writer: Writer) -> tuple[list[int], Ints] | None:
        """Return ids and their ends, token by token: where some are unknown, or several parts got a space."""
        _, lead, adds_space = writer
        encoding = self._backend.encode_with_offsets(text, writer)
        raw = (lead + text).encode()
        ends_of_characters = np.cumsum([0, *(len(character.encode()) for character in lead + text)])
        position, ends = 0, []
        may_add = adds_space and (self.prefix.even_before_space or not raw.startswith(b" "))
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            piece = self.token_bytes[token_id]
            if token_id == self.unk_id:
                if ends_of_characters[start] > position:
                    return None
                position = int(ends_of_characters[stop])
            elif may_add and piece.startswith(b" ") and raw.startswith(piece[1:], position):
                position += len(piece) - 1
            elif raw.startswith(piece, position):
                position += len(piece)
            else:
                return None
            ends.append(position)
            may_add = adds_space and token_id in self.vocabulary.text_added
        if position != len(raw):
            return None
        return encoding.ids, np.maximum(np.array(ends, dtype=np.int64) - len(lead), 0)

    def _fail(self, text: str) -> Tokens:
        """Say why a text cannot be encoded."""
        normal = self.normalize(text)
        if normal != text:
            at = next((i for i, (a, b) in enumerate(zip(text, normal, strict=False)) if a != b), len(normal))
            raise ValueError(
                f"tokenizer {self.spec} would change the text at character {at} "
                f"({text[at : at + 20]!r} becomes {normal[at : at + 20]!r}): call canonical_text first"
            )
        ids = self._backend.encode_with_offsets(text, self._backend.writer("start")).ids
        spelled = b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")
        if self.prefix.scheme != "never":
            spelled = spelled.removeprefix(" ")
        at = next((i for i, (a, b) in enumerate(zip(text, spelled, strict=False)) if a != b), len(spelled))
        raise ValueError(
            f"tokenizer {self.spec} cannot spell the text at character {at} ({text[at : at + 20]!r}): "
            "its vocabulary lacks these bytes, leave the document out"
        )


def load_tokenizer(
    spec: str | os.PathLike[str] | TokenizerSpec | Tokenizer | PreTrainedTokenizerBase,
    *,
    tokens_to_add: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Load a tokenizer and give it the special tokens that its spec asks for.

    Args:
        spec: `name_or_path:source=Family:target=Family:conversion=...`, a bare path, or `byte`; or one of
            transformers' tokenizers, read as it would be saved. A `Tokenizer` is returned as it is.
        tokens_to_add: control tokens appended after the last id; templates may use them, text never does.
        revision: commit or tag of a hub repository.
        trust_remote_code: run the repository's own code, where there is no tokenizer.json.

    Raises:
        FileNotFoundError: no such folder or hub repository.
        ValueError: a bad spec, a token to add that text may hold, files that are not those of a BPE or
            Unigram tokenizer, or a tokenizer without the special tokens of its `source` family.
    """
    if isinstance(spec, Tokenizer):
        return spec
    if isinstance(spec, str | os.PathLike):
        spec = parse_spec(os.fspath(spec))
    check_tokens_to_add(tokens_to_add)
    if not isinstance(spec, TokenizerSpec):
        called, files = read_object(spec)
        spec = TokenizerSpec(called)
    elif spec.name_or_path != BYTE:
        with well_formed(spec.name_or_path):
            files = read_files(spec.name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if spec.name_or_path == BYTE:
        name = spec.target or spec.source
        family = FAMILIES[name] if name else BYTE_FAMILY
        document = byte_document([*family.tokens.values(), *tokens_to_add])
        return Tokenizer(spec, document, family, tokens_to_add=tokens_to_add)
    with well_formed(spec.name_or_path):
        document, chat_template = files.document, files.chat_template
        if spec.conversion == "byte":
            document = byte_document(control_strings(document))
        family = FAMILIES[spec.source] if spec.source else generic_family(files)
        if spec.source:
            check_has_family(control_strings(document), family, spec.name_or_path)
        if spec.target:
            tokens = tokens_by_role(family, chat_template, control_strings(document))
            document = to_family(document, replace(family, tokens=tokens), FAMILIES[spec.target])
            family, chat_template = FAMILIES[spec.target], None
        if tokens_to_add:
            document = with_special_tokens(document, tokens_to_add)
        try:
            return Tokenizer(spec, document, family, chat_template, tokens_to_add)
        except ValueError as error:
            raise ValueError(f"tokenizer {spec} cannot be read byte for byte: {error}") from error


def canonical_text(text: str, *tokenizers: Tokenizer) -> str:
    """Return the text that every tokenizer leaves as it is: the fixed point of all their normalizers.

    Raises:
        ValueError: text that is not valid Unicode, or that the normalizers change back and forth.
    """
    for _ in range(MAX_ROUNDS):
        changed = False
        for tokenizer in tokenizers:
            normal = tokenizer.normalize(text)
            changed |= normal != text
            text = normal
        if not changed:
            return text
    names = ", ".join(str(tokenizer.spec) for tokenizer in tokenizers)
    raise ValueError(f"the normalizers of {names} undo each other's work on the text: leave it out")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            "text must be valid Unicode: it holds a lone surrogate, leave the document out"
        ) from error
