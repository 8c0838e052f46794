"""Tokens of two vocabularies that mean the same, by their bytes.

Dimensions: P pairs, M entries of a projection.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.vocabulary import vocabulary_strings
from tokenkit.tokenization.written import ids_by_bytes

MOST_PIECES = 4
"""Teacher tokens that a student token is carried to at most, as in arXiv:2605.21699."""
DECAY = 0.1
"""The weight of each further piece, in units of the one before it; ibidem."""


class TokenPairs(NamedTuple):
    """Ids that face each other; no id twice on either side."""

    student_P: NDArray[np.int64]
    """Rising."""
    teacher_P: NDArray[np.int64]


class ProjectionEntries(NamedTuple):
    """The entries of a sparse matrix from the student's vocabulary to the teacher's."""

    student_M: NDArray[np.int64]
    teacher_M: NDArray[np.int64]
    weight_M: NDArray[np.float32]
    """Those of one student id add up to 1."""


def matching_tokens(student: Tokenizer, teacher: Tokenizer) -> TokenPairs:
    """Return the pairs of text tokens with the same bytes, and of special tokens with the same role.

    Where a vocabulary spells the same bytes twice (a letter and its byte piece), what is written counts.

    Raises:
        ValueError: the two vocabularies share no token.
    """
    by_bytes = ids_by_bytes(teacher)
    pairs = {i: by_bytes[raw] for raw, i in ids_by_bytes(student).items() if raw in by_bytes}
    taken = set(pairs.values())
    for role, i in student.special_ids.items():
        partner = teacher.special_ids.get(role)
        if partner is not None and i not in pairs and partner not in taken:
            pairs[i] = partner
            taken.add(partner)
    if not pairs:
        raise ValueError(f"{student!r} and {teacher!r} share no token: there is nothing to compare")
    ids = sorted(pairs)
    return TokenPairs(np.array(ids, dtype=np.int64), np.array([pairs[i] for i in ids], dtype=np.int64))


def published_pairs(student: Tokenizer, teacher: Tokenizer) -> TokenPairs:
    """Return the pairs of tokens that TRL's GOLD compares one by one: those that are written with one string.

    Special tokens are no exception: a common role is no pair. Where a vocabulary does not write bytes as
    byte-level BPE does, strings do not say the same ("▁the" is "Ġthe"): then `matching_tokens` are meant.

    Raises:
        ValueError: the two vocabularies share no token.
    """
    if {student.vocabulary.alphabet, teacher.vocabulary.alphabet} != {"byte-level"}:
        return matching_tokens(student, teacher)
    strings, others = (_strings(tokenizer) for tokenizer in (student, teacher))
    pairs = sorted((strings[string], others[string]) for string in strings.keys() & others.keys())
    if not pairs:
        raise ValueError(f"{student!r} and {teacher!r} share no token: there is nothing to compare")
    return TokenPairs(*np.array(pairs, dtype=np.int64).T.copy())


def _strings(tokenizer: Tokenizer) -> dict[str, int]:
    """Return a vocabulary with its added tokens, string to id."""
    added = tokenizer.document.get("added_tokens") or []
    return vocabulary_strings(tokenizer.document["model"]) | {
        token["content"]: token["id"] for token in added
    }


def projection_entries(student: Tokenizer, teacher: Tokenizer) -> ProjectionEntries:
    """Return how X-Token carries each student token into the teacher's vocabulary.

    A token with a partner of the same bytes or role goes there whole. Any other is written by the teacher's
    tokenizer, and goes to its first four pieces with weights that fall by a factor of ten each. Tokens that
    are no text by themselves (part of a character) and have no partner are carried nowhere.

    Source: Turuvekere Sreenivas et al. 2026, arXiv:2605.21699.
    """
    pairs = matching_tokens(student, teacher)
    rows = {int(s): [int(t)] for s, t in zip(*pairs, strict=True)}
    alone = {i: raw for raw, i in ids_by_bytes(student).items() if i not in rows}
    texts = {i: text for i, raw in alone.items() if (text := _decoded(raw)) is not None}
    encoded = teacher.try_encode_batch(list(texts.values()), "text")
    for i, tokens in zip(texts, encoded, strict=True):
        if tokens is not None:
            rows[i] = tokens.ids[:MOST_PIECES].tolist()
    entries: dict[tuple[int, int], float] = {}
    for i in sorted(rows):
        weights = [DECAY**place for place in range(len(rows[i]))]
        for teacher_id, weight in zip(rows[i], weights, strict=True):
            entries[i, teacher_id] = entries.get((i, teacher_id), 0.0) + weight / sum(weights)
    ids = np.array(list(entries), dtype=np.int64)
    return ProjectionEntries(ids[:, 0], ids[:, 1], np.array(list(entries.values()), dtype=np.float32))


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
