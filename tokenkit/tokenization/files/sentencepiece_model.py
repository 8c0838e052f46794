"""A SentencePiece model file as a parsed tokenizer.json: for folders that hold nothing else.

The file is a protocol buffer (sentencepiece_model.proto). Read here are the pieces with their scores and
types, the model type and its unknown id, and the normalizer with its compiled character map. A BPE model
stores no merges: two pieces merge where their concatenation is a piece, those with better scores first.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MODEL_TYPES = {1: "Unigram", 2: "BPE"}
_SPACE = "▁"
_POINTER = b"version https://git-lfs"
_TIKTOKEN = re.compile(rb"(?:[A-Za-z0-9+/]+={0,2} \d+\r?\n){3}")


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    string: str
    score: float
    kind: int


class Model(NamedTuple):
    """What the file says, with the format's own defaults where it says nothing."""

    pieces: list[Piece]
    model_type: int
    adds_dummy_prefix: bool
    removes_extra_whitespace: bool
    charsmap: bytes
    path: Path


def sentencepiece_document(path: Path) -> dict[str, Any]:
    """Return the tokenizer.json that cuts text as the SentencePiece model does.

    Raises:
        ValueError: the file is not a SentencePiece model, or one of words or characters.
    """
    _check_kind(path)
    model = _read(path)
    if model.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path} is a SentencePiece model of words or characters: only Unigram and BPE are read"
        )
    pieces = model.pieces
    unk_id = next((index for index, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    byte_fallback = any(piece.kind == BYTE for piece in pieces)
    common = {"type": MODEL_TYPES[model.model_type], "byte_fallback": byte_fallback}
    if common["type"] == "Unigram":
        vocab = [[piece.string, piece.score] for piece in pieces]
        backend: dict[str, Any] = {**common, "unk_id": unk_id, "vocab": vocab}
    else:
        backend = {
            **common,
            "dropout": None,
            "unk_token": None if unk_id is None else pieces[unk_id].string,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            # A user-defined piece comes of no merge; the pre-tokenizer hands it over whole.
            "ignore_merges": any(piece.kind == USER_DEFINED for piece in pieces),
            "vocab": {piece.string: index for index, piece in enumerate(pieces)},
            "merges": merges(pieces),
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, piece) for index, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": _user_defined([piece.string for piece in pieces if piece.kind == USER_DEFINED]),
        "post_processor": None,
        "decoder": _decoder(model.adds_dummy_prefix),
        "model": backend,
    }


def check_is_no_pointer(path: Path) -> None:
    """Refuse what Git leaves in the place of a large file.

    Raises:
        ValueError: it is a pointer of Git LFS.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull`")


def _check_kind(path: Path) -> None:
    check_is_no_pointer(path)
    with path.open("rb") as file:
        head = file.read(4096)
    if _TIKTOKEN.match(head):
        raise ValueError(
            f"{path} is a tiktoken file (lines of base64 and a rank), not a SentencePiece model: "
            "name a folder with the tokenizer.json of the same tokenizer, which the model's Hugging Face "
            "repository has"
        )
    if head.lstrip().startswith(b"{"):
        raise ValueError(f"{path} is JSON, not a SentencePiece model: name a folder with a tokenizer.json")


def _user_defined(strings: list[str]) -> dict[str, Any] | None:
    """Cut user-defined pieces out, longest first.

    As added tokens they would be cut out before the normalizer, which would then put a space in front of
    whatever follows.
    """
    if not strings:
        return None
    longest_first = sorted(strings, key=len, reverse=True)
    pattern = {"Regex": "|".join(map(re.escape, longest_first))}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _normalizers(model: Model) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        parts.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.removes_extra_whitespace:
        parts.append(_replace({"Regex": r"\A +| +\z"}, ""))
        parts.append(_replace({"Regex": " {2,}"}, " "))
    if model.adds_dummy_prefix:
        parts.append({"type": "Prepend", "prepend": _SPACE})
    return [*parts, _replace({"String": " "}, _SPACE)]


def _decoder(strips: bool) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        _replace({"String": _SPACE}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strips:
        parts.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": parts}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _added(index: int, piece: Piece) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": piece.string, **flags, "special": True}


def merges(pieces: list[Piece]) -> list[list[str]]:
    """Return the merges of a BPE model, best first."""
    # Control, unknown and byte pieces come of no merge and take part in none.
    rank = {piece.string: index for index, piece in enumerate(pieces) if piece.kind == NORMAL}
    candidates: list[tuple[float, int, int, int, str, str]] = []
    for index, piece in enumerate(pieces):
        if piece.kind != NORMAL:
            continue
        string = piece.string
        splits = ((string[:at], string[at:]) for at in range(1, len(string)))
        found = [(rank[a], rank[b], a, b) for a, b in splits if a in rank and b in rank]
        candidates += [(-piece.score, index, *split) for split in sorted(found)]
    return [[left, right] for *_, left, right in sorted(candidates)]


def _read(path: Path) -> Model:
    pieces, model_type, adds_prefix, removes, charsmap = [], 1, True, True, b""
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                entry = dict(_fields(value))
                (score,) = struct.unpack("<f", entry.get(2, b"\0" * 4))
                pieces.append(Piece(entry[1].decode("utf-8"), score, entry.get(3, NORMAL)))
            elif field == 2:
                model_type = dict(_fields(value)).get(3, model_type)
            elif field == 3:
                normalizer = dict(_fields(value))
                charsmap = normalizer.get(2, b"")
                adds_prefix, removes = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    except (IndexError, KeyError, UnicodeDecodeError, struct.error, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error!r}): fetch it again") from error
    if not pieces:
        raise ValueError(f"{path} is not a SentencePiece model: it holds no pieces, fetch it again")
    return Model(pieces, model_type, adds_prefix, removes, charsmap, path)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer message: numbers as int, all else as bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, at = _varint(raw, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise TypeError(f"wire type {wire_type}")
        if at + size > len(raw):
            raise IndexError("the file ends inside a field")
        yield key >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
