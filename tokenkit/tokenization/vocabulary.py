"""The exact bytes of every token id, and the tokenizer that reads text as nothing but text.

Works on the parsed `tokenizer.json`. Three ways of writing bytes as vocabulary strings are known:

    byte-level   each byte is one of 256 printable characters (GPT-2): "Ġthe" is b" the"
    metaspace    "▁" stands for a space (SentencePiece); "<0x0A>" is a byte where byte_fallback is on
    plain        the string itself, in UTF-8

**Which added tokens are text.** A tokenizer's added tokens are cut out of the text before its model sees
it. Those that are *control* tokens must not be: text that contains their string is plain text. An added
token is control if it is marked special, or looks like markup (`<tool_call>`, `[INST]`, `<|x|>`) that is
not an HTML tag. All others (runs of whitespace, HTML tags, words) are text and stay; one of them that
swallows neighbouring whitespace (`lstrip`, `rstrip`) has no bytes of its own and is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Alphabet = Literal["byte-level", "metaspace", "plain"]
METASPACE = "▁"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
MODELS = ("BPE", "Unigram")
MAX_SPREAD = 16  # ids for each token that there is: a table of all ids is made

_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|p|br|hr|sub|sup|code|pre|"
    r"ul|ol|li|div|span|a)/?>"
)
_UNMATCHABLE = " control {id} "  # no alphabet leaves a raw space in what its model sees


def _byte_alphabet() -> str:
    """Return the 256 characters of GPT-2's alphabet, in the order of the bytes that they stand for."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


BYTE_ALPHABET = _byte_alphabet()
# Characters outside the alphabet become unencodable, so that `.encode("latin-1")` refuses them.
_TO_LATIN_1 = {code: "\uffff" for code in range(256)} | {
    ord(c): chr(byte) for byte, c in enumerate(BYTE_ALPHABET)
}


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says about its ids."""

    token_bytes: list[bytes]
    """The bytes of every id; a control token's string in UTF-8; b"" for an id that nothing has."""
    is_special_V: NDArray[np.bool_]
    """Control tokens, the unknown token, and ids that nothing has."""
    control: dict[str, int]
    """Control tokens by their string, in the order of their ids."""
    text_added: frozenset[int]
    """Ids of added tokens that are text."""
    unk_id: int | None
    """The id that text can turn into where the vocabulary cannot spell it; None where it always can."""
    alphabet: Alphabet

    def lengths(self) -> NDArray[np.int32]:
        """Return how many bytes each token adds to the text, [V]; 0 for special ids."""
        lengths_V = np.fromiter(map(len, self.token_bytes), dtype=np.int32, count=len(self.token_bytes))
        return np.where(self.is_special_V, np.int32(0), lengths_V)


def read_vocabulary(document: Mapping[str, Any], *, prebyteified: bool = False) -> Vocabulary:
    """Read the bytes of every id of a parsed tokenizer.json.

    Raises:
        ValueError: a model whose tokens do not spell text byte for byte (WordPiece, BPE with word endings).
    """
    model = document["model"]
    _check_model(model)
    alphabet: Alphabet = "byte-level" if prebyteified else find_alphabet(document)
    strings = vocabulary_strings(model)
    added = document.get("added_tokens") or []
    size = 1 + max([*strings.values(), *(token["id"] for token in added)], default=-1)
    if size > MAX_SPREAD * (len(strings) + len(added)) + 2**20:
        raise ValueError(
            f"its largest id is {size - 1:,}, for {len(strings) + len(added):,} tokens: mend the ids"
        )
    token_bytes, is_special_V = [b""] * size, np.ones(size, dtype=bool)
    has_byte_pieces = alphabet == "metaspace" and bool(model.get("byte_fallback"))
    for string, token_id in strings.items():
        spelled = _spelled(string, alphabet, has_byte_pieces)
        token_bytes[token_id] = string.encode() if spelled is None else spelled
        is_special_V[token_id] = spelled is None
    control: dict[str, int] = {}
    for token in sorted(added, key=lambda token: token["id"]):
        string, token_id = token["content"], token["id"]
        if is_control(token):
            control[string] = token_id
            token_bytes[token_id], is_special_V[token_id] = string.encode(), True
        else:
            _check_keeps_spaces(token)
            text = string.replace(METASPACE, " ") if alphabet == "metaspace" else string
            token_bytes[token_id], is_special_V[token_id] = text.encode(), False
    unk_id = _unknown_id(model, strings, alphabet)
    if unk_id is not None:
        is_special_V[unk_id] = True
    text_added = frozenset(token["id"] for token in added if not is_control(token))
    return Vocabulary(token_bytes, is_special_V, control, text_added, unk_id, alphabet)


def _check_keeps_spaces(token: Mapping[str, Any]) -> None:
    """Refuse text that takes spaces along: which bytes it stands for would depend on what is around it."""
    if flags := [flag for flag in ("lstrip", "rstrip") if token.get(flag)]:
        raise ValueError(
            f"the added token {token['content']!r} is a word that swallows the whitespace beside it "
            f"({', '.join(flags)}): mark it special in tokenizer.json (text then spells it out), or clear "
            "the flags"
        )


def is_control(added_token: Mapping[str, Any]) -> bool:
    """Whether an entry of `added_tokens` is a control token; the module says when."""
    string = added_token["content"]
    if added_token.get("special"):
        return True
    return bool(_MARKUP.fullmatch(string)) and not _HTML.fullmatch(string)


def vocabulary_strings(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the model's vocabulary (without added tokens) as string to id."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {piece: index for index, (piece, _) in enumerate(vocab)}


def find_alphabet(document: Mapping[str, Any]) -> Alphabet:
    """Return how the vocabulary's strings stand for bytes."""
    types = set(_types(document.get("pre_tokenizer"))) | set(_types(document.get("normalizer")))
    if "ByteLevel" in types:
        return "byte-level"
    parts = [document.get("normalizer"), document.get("pre_tokenizer")]
    # A plain scan of the JSON text: the mark sits in Prepend, Replace or Metaspace, at any depth.
    return "metaspace" if METASPACE in json.dumps(parts, ensure_ascii=False) else "plain"


def plain_text_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json that never produces a control token: same ids for all other text.

    Control tokens leave `added_tokens`, and their vocabulary entries keep the id under a name that no
    text contains: a Unigram model would match `</s>` as a piece. Templates and truncation are dropped.
    The characters `<0x0A>` in a text are not the byte's piece either.
    """
    added = document.get("added_tokens") or []
    control = {token["content"]: token["id"] for token in added if is_control(token)}
    model = (
        dict(document["model"], dropout=None)
        if document["model"]["type"] == "BPE"
        else dict(document["model"])
    )
    hidden = {string: _UNMATCHABLE.format(id=token_id) for string, token_id in control.items()}
    strings = vocabulary_strings(model)
    if any(string in strings for string in hidden):
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(string, string): token_id for string, token_id in strings.items()}
        else:
            model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        if model.get("merges"):
            model["merges"] = list(_merges_without(model["merges"], hidden))
    text_added = [token for token in added if not is_control(token)]
    pre_tokenizer = document.get("pre_tokenizer")
    if model["type"] == "Unigram" and model.get("byte_fallback"):
        pre_tokenizer = _spelling_byte_pieces(pre_tokenizer)
    return {
        **document,
        "pre_tokenizer": pre_tokenizer,
        "model": with_entries(model, text_added),
        "added_tokens": text_added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def spell(text: str) -> str | None:
    """Undo the byte-level alphabet; None where the bytes are not UTF-8 or a character is outside it."""
    raw = _from_byte_alphabet(text)
    try:
        return None if raw is None else raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("type") not in MODELS:
        raise ValueError(
            f"only {' and '.join(MODELS)} models spell text byte for byte: got {model.get('type')}, "
            "choose another tokenizer"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(
                f"a BPE model with {key}={model[key]!r} does not say where the spaces were: "
                "choose another tokenizer"
            )


def _spelled(string: str, alphabet: Alphabet, has_byte_pieces: bool) -> bytes | None:
    """Return the bytes of a vocabulary string; None if no text can produce it."""
    if alphabet == "byte-level":
        return _from_byte_alphabet(string)
    if alphabet == "plain":
        return string.encode()
    if has_byte_pieces and (match := BYTE_PIECE.fullmatch(string)):
        return bytes([int(match[1], 16)])
    return string.replace(METASPACE, " ").encode()


def _from_byte_alphabet(string: str) -> bytes | None:
    try:
        return string.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        return None


def _unknown_id(model: Mapping[str, Any], strings: Mapping[str, int], alphabet: Alphabet) -> int | None:
    if model["type"] == "Unigram":
        unk_id = model.get("unk_id")
    else:
        unk_id = strings.get(model["unk_token"]) if model.get("unk_token") is not None else None
    if alphabet == "byte-level":
        complete = all(character in strings for character in BYTE_ALPHABET)
    else:
        complete = bool(model.get("byte_fallback")) and all(
            f"<0x{byte:02X}>" in strings for byte in range(256)
        )
    return None if complete else unk_id


def _spelling_byte_pieces(pre_tokenizer: Any) -> dict[str, Any]:
    """Cut the characters `<0x0A>` behind the first: a Unigram model would match them as the byte's piece."""
    cut = {
        "type": "Split",
        "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [*([pre_tokenizer] if pre_tokenizer else []), cut]}


def with_entries(model: dict[str, Any], added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give added tokens a vocabulary entry: without it the tokenizers library numbers them anew."""
    strings = vocabulary_strings(model)
    missing = {token["id"]: token["content"] for token in added if token["content"] not in strings}
    if not missing:
        return model
    if isinstance(model["vocab"], dict):
        return {**model, "vocab": {**strings, **{string: token_id for token_id, string in missing.items()}}}
    # SentencePiece's own user-defined pieces are in the list, with the mark for a space in their names.
    vocab = [[missing.get(token_id, piece), score] for token_id, (piece, score) in enumerate(model["vocab"])]
    lowest = min((score for _, score in vocab), default=0.0)  # the score of unknown characters depends on it
    for token_id in range(len(vocab), 1 + max(missing)):
        vocab.append([missing.get(token_id, _UNMATCHABLE.format(id=token_id)), lowest])
    return {**model, "vocab": vocab}


def _merges_without(merges: Sequence[Any], hidden: Mapping[str, str]) -> Iterator[Any]:
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not (left in hidden or right in hidden or left + right in hidden):
            yield merge


def _types(part: Any) -> Iterator[str]:
    """Yield the type of a normalizer or pre-tokenizer and of all its parts."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)
