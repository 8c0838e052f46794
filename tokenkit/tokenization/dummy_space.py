"""The space that some tokenizers put in front of text, and how to leave it out.

prepend     SentencePiece BPE (Llama 2): always, even where the text begins with a space
metaspace   SentencePiece as a pre-tokenizer (T5): unless the text begins with a space
byte-level  RoBERTa-like: unless the text begins with a space
manual      the spec said so: the backend adds none, and `Tokenizer` writes one in front
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenkit.tokenization.vocabulary import METASPACE

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
