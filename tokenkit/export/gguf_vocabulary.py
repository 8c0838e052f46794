"""A tokenizer in the words of GGUF: strings, types, scores, merges, and what cuts text before the merges.

    gpt2     byte-level BPE, and our bytes, which are a BPE without merges
    llama    SentencePiece BPE with byte fallback: those neighbours merge whose piece has the best score

Programs that read GGUF do not normalise text (NFC, collapsed spaces), so a tokenizer is written as it
reads canonical text. What cuts text into words is known there by name; another rule cannot be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenkit.errors import DataError
from tokenkit.tokenization.vocabulary import (
    BYTE_ALPHABET,
    BYTE_PIECE,
    METASPACE,
    vocabulary_strings,
)
from tokenkit.tokenization.written import writable_text

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of a token, as GGUF numbers them."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT_LLAMA3 = _CONTRACTIONS + _WORDS
_SPLIT_QWEN2 = _SPLIT_LLAMA3.replace("{1,3}", "")
SAMPLES = (
    "The quick brown fox, naïve in 1984 —\n\tjumps: 東京 🙂 over it.",
    "Once upon a time, there was a little girl. She didn't like the bananas!\n\nThe end",
    "def f(x):\n    return x + 12345  # don't\r\n",
    "Привет, мир! नमस्ते العربية",
)


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file says of a tokenizer; one entry for each row of the embedding."""

    model: str
    """gpt2 or llama."""
    pre: str
    """The name of the rule that cuts text into words."""
    strings: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    """Of llama."""
    merges: list[str] = field(default_factory=list)
    """Of gpt2."""
    adds_space: bool = False
    """A space is put in front of text."""


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> GgufVocabulary:
    """Return `tokenizer` as a GGUF file holds it.

    Args:
        tokenizer: byte-level BPE, bytes, or SentencePiece BPE with byte fallback.
        rows: of the embedding, at least as many as there are tokens.

    Raises:
        DataError: a tokenizer of another kind.
    """
    document, alphabet = tokenizer.document, tokenizer.vocabulary.alphabet
    model = document["model"]
    has_bytes = alphabet == "byte-level" or (alphabet == "metaspace" and bool(model.get("byte_fallback")))
    if model["type"] != "BPE" or not has_bytes or tokenizer.prefix.is_manual:
        kind = f"{model['type']} over {'characters' if alphabet == 'plain' else alphabet} strings"
        raise DataError(
            f"tokenizer {tokenizer.spec} is {kind}, and GGUF is written of byte-level BPE, of bytes, and of "
            "SentencePiece BPE with byte fallback"
        )
    strings, types = _tokens(tokenizer, rows)
    if alphabet == "byte-level":
        merges = [" ".join(_pair(merge)) for merge in model.get("merges") or ()]
        return GgufVocabulary("gpt2", _words_rule(tokenizer), strings, types, merges=merges)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges") or ()):
        ranks.setdefault("".join(_pair(merge)), rank)
    worst = len(ranks) + 1.0
    scores = [-float(ranks.get(string, worst)) for string in strings]
    adds_space = tokenizer.prefix.scheme != "never"
    found = GgufVocabulary("llama", "default", strings, types, scores=scores, adds_space=adds_space)
    _check_scores(tokenizer, found)
    return found


def token_bytes(vocabulary: GgufVocabulary, token_id: int) -> bytes:
    """Return what a token of a GGUF file spells, as its readers see it; of an unused one nothing."""
    string, kind = vocabulary.strings[token_id], vocabulary.types[token_id]
    if kind == UNUSED:
        return b""
    if kind == BYTE:
        return bytes([int(string[3:5], 16)])
    if kind != NORMAL:
        return string.encode()
    if vocabulary.model == "gpt2":
        return bytes(BYTE_ALPHABET.index(character) for character in string)
    return string.replace(METASPACE, " ").encode()


def _tokens(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Return string and type of every row; a row that no token has gets a name that no text spells."""
    strings, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    has_fallback = tokenizer.vocabulary.alphabet == "metaspace"
    for string, token_id in vocabulary_strings(tokenizer.document["model"]).items():
        strings[token_id] = string
        is_byte = has_fallback and BYTE_PIECE.fullmatch(string)
        types[token_id] = BYTE if is_byte else UNUSED if tokenizer.is_special_V[token_id] else NORMAL
    for token_id in tokenizer.vocabulary.text_added:
        strings[token_id], types[token_id] = tokenizer.token_bytes[token_id].decode(), USER_DEFINED
    for string, token_id in tokenizer.control.items():
        strings[token_id], types[token_id] = string, CONTROL
    if (unknown := unknown_id(tokenizer)) is not None:
        types[unknown] = UNKNOWN
    return strings, types


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the unknown token, also where bytes spell all that could be unknown."""
    string = tokenizer.document["model"].get("unk_token")
    if string is None:
        return None
    token_id = tokenizer.control.get(string, vocabulary_strings(tokenizer.document["model"]).get(string))
    return token_id if token_id is not None and tokenizer.is_special_V[token_id] else None


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _words_rule(tokenizer: Tokenizer) -> str:
    """Return the name under which readers of GGUF know how byte-level BPE cuts words.

    Raises:
        DataError: a rule without a name.
    """
    document = tokenizer.document
    model = document["model"]
    if not model.get("merges") and not tokenizer.vocabulary.text_added:
        return "smollm"  # no rule changes what has no merges; this one keeps spaces when text is put together
    parts = [_rule(part) for part in _parts(document.get("pre_tokenizer"))]
    ignores = bool(model.get("ignore_merges"))
    names = {
        (("ByteLevel", True),): "gpt-2",
        (("Digits", True), ("ByteLevel", True)): "smollm",
        (("Split", _SPLIT_LLAMA3), ("ByteLevel", False)): "llama-bpe" if ignores else "smaug-bpe",
        (("Split", _SPLIT_QWEN2), ("ByteLevel", False)): "qwen2",
    }
    name = names.get(tuple(parts))
    if name is None or (ignores and name != "llama-bpe") or tokenizer.prefix.scheme != "never":
        raise DataError(
            f"tokenizer {tokenizer.spec} cuts text into words by a rule that GGUF has no name for: known are "
            "those of GPT-2, SmolLM, Llama 3 and Qwen 2"
        )
    return name


def _parts(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer.get("pretokenizers") or [pre_tokenizer])


def _rule(part: Mapping[str, Any]) -> tuple[str, Any]:
    """Return what matters of one step that cuts text."""
    kind = part["type"]
    if kind == "ByteLevel":
        return kind, bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part.get("individual_digits"))
    pattern = part.get("pattern") or {}
    is_plain = part.get("behavior") == "Isolated" and not part.get("invert")
    return kind, pattern.get("Regex") if is_plain else json.dumps(part)


def _check_scores(tokenizer: Tokenizer, vocabulary: GgufVocabulary) -> None:
    """Cut a few texts by scores, as readers of GGUF do: their merges are any two pieces that make a third.

    Raises:
        DataError: the tokenizer's own merges give other tokens.
    """
    ids = {string: i for i, string in enumerate(vocabulary.strings) if vocabulary.types[i] == NORMAL}
    for sample in SAMPLES:
        text, _ = writable_text(sample, [tokenizer])
        wanted = tokenizer.encode(text).ids.tolist() if text else []
        if set(wanted) & tokenizer.vocabulary.text_added:
            continue
        lead = METASPACE if vocabulary.adds_space else ""
        pieces = merged_by_score(lead + text.replace(" ", METASPACE), ids, vocabulary.scores)
        got = [i for piece in pieces for i in _ids_of(piece, ids, vocabulary)]
        if got != wanted:
            raise DataError(
                f"tokenizer {tokenizer.spec} merges in an order that no scores express, and GGUF knows "
                "SentencePiece by its scores alone"
            )


def merged_by_score(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Return the pieces of a text: again and again the two neighbours merge whose piece scores best."""
    pieces = list(text)
    while True:
        joined = [a + b for a, b in pairwise(pieces)]
        known = [(scores[ids[piece]], -at) for at, piece in enumerate(joined) if piece in ids]
        if not known:
            return pieces
        at = -max(known)[1]
        pieces[at : at + 2] = [joined[at]]


def _ids_of(piece: str, ids: Mapping[str, int], vocabulary: GgufVocabulary) -> list[int]:
    if piece in ids:
        return [ids[piece]]
    return [vocabulary.strings.index(f"<0x{byte:02X}>") for byte in piece.encode()]
