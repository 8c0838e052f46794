"""Classes of a text's bytes, by the character that each belongs to: digits, whitespace, every script."""

from __future__ import annotations

import unicodedata

import numpy as np
from numpy.typing import NDArray

FIRST = ("Latin letters", "digits", "whitespace", "punctuation and symbols")
"""In this order; behind them scripts by their share of the bytes."""
OTHERS = "others"
_SCRIPTS = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA-KATAKANA": "Hiragana",
    "KATAKANA-HIRAGANA": "Katakana",
    "OLD": OTHERS,
    "COMBINING": OTHERS,
    "MODIFIER": OTHERS,
    "CANADIAN": "Canadian syllabics",
    "LATIN": "Latin letters",
    "FEMININE": "Latin letters",
    "MASCULINE": "Latin letters",
    "MICRO": "Greek",
    "OHM": "Greek",
    "KELVIN": "Latin letters",
    "ANGSTROM": "Latin letters",
}
"""By the first word of a character's name, where that does not name its script."""
_WIDTHS = ("FULLWIDTH", "HALFWIDTH", "SMALL", "MATHEMATICAL")


def class_of(character: str) -> str | None:
    """Return the class of a character; None: that of the character before it, as of an accent."""
    kind = unicodedata.category(character)
    if character.isspace():
        return "whitespace"
    if kind[0] in "NPS":
        return "digits" if kind[0] == "N" else "punctuation and symbols"
    words = unicodedata.name(character, "").split()
    if kind == "Cf" or (kind[0] == "M" and words[:1] in ([], ["COMBINING"], ["VARIATION"])):
        return None
    if len(words) > 1 and words[0] in _WIDTHS:
        words = words[1:] if words[0] != "MATHEMATICAL" else ["LATIN"]
    if kind[0] not in "LM" or not words:
        return OTHERS
    return _SCRIPTS.get(words[0], words[0].capitalize())


def classes_of(text: str) -> tuple[list[str], NDArray[np.int32]]:
    """Return the classes of a text, and for each of its UTF-8 bytes the index of its own."""
    known = {character: (class_of(character), len(character.encode())) for character in set(text)}
    names: dict[str, int] = {}
    kind_of, length_of, last = [], [], OTHERS
    for character in text:
        kind, length = known[character]
        last = last if kind is None else kind
        kind_of.append(names.setdefault(last, len(names)))
        length_of.append(length)
    return list(names), np.repeat(np.array(kind_of, np.int32), np.array(length_of, np.int64))
