"""For every student token the teacher token whose bytes are nearest to its own.

Distances are Levenshtein distances on bytes. A token whose bytes the teacher has too maps to that one, a
special token to the teacher's of the same role; all others are compared with every text token of the
teacher. The search deepens: bound k asks only for distances of at most k, which a bit-parallel scorer
answers fast and which no token more than k bytes longer or shorter can have. Most tokens leave at a small k.

Source: Wan et al. 2024, "Knowledge Fusion of Large Language Models", arXiv:2401.10491 (MinED).

Dimensions: V student vocabulary, W teacher vocabulary, Q tokens still without a partner, C candidates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenkit.disk import check_vacant
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.written import ids_by_bytes

BOUNDS = (1, 2, 3, 4, 6, 9, 14, 24, 60)
BLOCK = 256  # student tokens compared at once: 256 x 128k distances of 16 bits are 64 MiB

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class MinedMapping:
    """A teacher token for every student token."""

    teacher_V: NDArray[np.int64]
    """[V] teacher id."""
    distance_V: NDArray[np.int32]
    """[V] bytes to insert, delete or replace; 0 where both are the same bytes, or special of one role."""

    def summary(self) -> dict[str, object]:
        """Return how many tokens lie at each distance, and the mean distance."""
        distances, counts = np.unique(self.distance_V, return_counts=True)
        return {
            "tokens": len(self.distance_V),
            "exact": int((self.distance_V == 0).sum()),
            "mean_distance": float(self.distance_V.mean()),
            "by_distance": {str(d): int(n) for d, n in zip(distances, counts, strict=True)},
        }


def mine_mapping(
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    teacher_counts: NDArray[np.integer] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> MinedMapping:
    """Return the nearest teacher token of every student token.

    Args:
        student: whose vocabulary is mapped.
        teacher: whose vocabulary is searched.
        teacher_counts: [W] how often each teacher token occurs; of equally near tokens the most frequent
            wins, then the lowest id. None: ids alone decide, which a BPE numbers by frequency.
        workers: threads; 0: one for each core.
        progress: called with the number of tokens that found their partner.

    Raises:
        ValueError: if the counts are of another vocabulary, the teacher has no text token, or no byte of one
            vocabulary occurs in the other.
    """
    order_W = _preference(teacher, teacher_counts)
    candidates = _Candidates(teacher, order_W)
    _check_shares_bytes(student, teacher)
    V = student.vocab_size
    teacher_V, distance_V = np.full(V, -1, np.int64), np.zeros(V, np.int32)
    for role, token_id in student.special_ids.items():
        if role in teacher.special_ids:
            teacher_V[token_id] = teacher.special_ids[role]
    exact = candidates.id_of_text
    specials = candidates.id_of_special
    open_ids = []
    for token_id in np.flatnonzero(teacher_V < 0).tolist():
        known = specials if student.is_special_V[token_id] else exact
        teacher_V[token_id] = known.get(student.token_bytes[token_id], -1)
        if teacher_V[token_id] < 0:
            open_ids.append(token_id)
    if progress is not None:
        progress(V - len(open_ids))
    texts = [student.token_bytes[token_id] for token_id in open_ids]
    for places_Q, found_Q, distance_Q in candidates.nearest(texts, workers or os.cpu_count() or 1):
        ids = np.array(open_ids)[places_Q]
        teacher_V[ids], distance_V[ids] = found_Q, distance_Q
        if progress is not None:
            progress(len(ids))
    return MinedMapping(teacher_V, distance_V)


def _preference(teacher: Tokenizer, counts: NDArray[np.integer] | None) -> NDArray[np.int64]:
    """Return the teacher's ids, the preferred first."""
    if counts is None:
        return np.arange(teacher.vocab_size)
    if counts.shape != (teacher.vocab_size,):
        raise ValueError(
            f"teacher_counts must hold one count per teacher token ({teacher.vocab_size}): got shape "
            f"{counts.shape}; are they those of the other tokenizer?"
        )
    return np.argsort(-counts.astype(np.float64), kind="stable")


def _check_shares_bytes(student: Tokenizer, teacher: Tokenizer) -> None:
    """Refuse a pair in which every token is as far from all others as they are long."""
    ours, theirs = (
        set(b"".join(t.token_bytes[i] for i in np.flatnonzero(~t.is_special_V))) for t in (student, teacher)
    )
    if not ours & theirs:
        raise ValueError(
            f"tokenizers {student.spec} and {teacher.spec} share no bytes, so no token is near to another: "
            "check that both name what they are meant to"
        )


class _Candidates:
    """The teacher's text tokens, the preferred first, so that the first of equal distances wins."""

    def __init__(self, teacher: Tokenizer, order_W: NDArray[np.int64]) -> None:
        ids = order_W.tolist()
        self.id_of_text: dict[bytes, int] = {}
        self.id_of_special: dict[bytes, int] = {}
        written = ids_by_bytes(teacher)
        for token_id in ids:
            text = teacher.token_bytes[token_id]
            if teacher.is_special_V[token_id]:
                self.id_of_special.setdefault(text, token_id)
            elif written.get(text) == token_id:
                self.id_of_text[text] = token_id
        if not self.id_of_text:
            raise ValueError(f"teacher tokenizer {teacher.spec} has no text token to map to")
        self.text_C = np.array([text.decode("latin-1") for text in self.id_of_text], dtype=object)
        self.id_C = np.array(list(self.id_of_text.values()), np.int64)
        self.length_C = np.array([len(text) for text in self.id_of_text], np.int64)

    def nearest(
        self, texts: Sequence[bytes], workers: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield places in `texts`, the teacher id nearest to each, and its distance, a block at a time."""
        length_Q = np.array([len(text) for text in texts], np.int64)
        open_Q = np.arange(len(texts))
        longest = int(max(length_Q.max(initial=0), self.length_C.max()))
        for bound in (*(b for b in BOUNDS if b < longest), longest):
            still_open = []
            for length in np.unique(length_Q[open_Q]).tolist():
                places_Q = open_Q[length_Q[open_Q] == length]
                near_C = np.flatnonzero(np.abs(self.length_C - length) <= bound)
                for start in range(0, len(places_Q), BLOCK):
                    block_Q = places_Q[start : start + BLOCK]
                    words = [texts[place].decode("latin-1") for place in block_Q.tolist()]
                    best_Q, distance_Q = _closest(words, self.text_C[near_C], bound, workers)
                    hit_Q = distance_Q <= bound
                    still_open.append(block_Q[~hit_Q])
                    if hit_Q.any():
                        yield block_Q[hit_Q], self.id_C[near_C[best_Q[hit_Q]]], distance_Q[hit_Q]
            open_Q = np.concatenate(still_open) if still_open else open_Q[:0]


def _closest(
    words: Sequence[str], candidates_C: NDArray[np.object_], bound: int, workers: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first nearest candidate of each word and its distance; above `bound`: none so near."""
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

    if not len(candidates_C):
        return np.zeros(len(words), np.int64), np.full(len(words), bound + 1)
    distance_QC = process.cdist(
        words,
        candidates_C.tolist(),
        scorer=Levenshtein.distance,
        score_cutoff=bound,
        dtype=np.uint16,
        workers=workers,
    )
    best_Q = distance_QC.argmin(1)
    return best_Q, distance_QC[np.arange(len(words)), best_Q].astype(np.int64)


FILES = ("mapping.npy", "distances.npy", "summary.json")


def save_mapping(mapping: MinedMapping, folder: Path, about: Mapping[str, object]) -> None:
    """Write mapping.npy, distances.npy and summary.json (which begins with `about`) to a folder.

    Raises:
        FileExistsError: if one of the files exists.
    """
    check_vacant(folder, FILES)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / FILES[0], mapping.teacher_V)
    np.save(folder / FILES[1], mapping.distance_V)
    text = json.dumps({**about, **mapping.summary()}, indent=1) + "\n"
    (folder / FILES[2]).write_text(text, encoding="utf-8")
