"""Tokenization biases of a pair of tokens: how far the ends of two tokenizations differ in what may follow.

    teacher ends in [ Hell]    student ends in [ell]      both say "ell" last
    the teacher would have written [ Hello], so "o" cannot follow [ Hell]; the student may well write [o] next

The bias of the teacher's token is the unigram probability of the tokens that its cover (`covers.py`)
rules out and the student's cover does not, and the other way round: 0 means that whatever may follow the one
end may follow the other. `alm_unbiased` joins chunks until both biases are small.

A pair exists where the bytes of one token end with those of the other. Whitespace alone has bias 1: how runs
of it are cut depends on what follows.

Source: Minixhofer et al. 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood
Matching", arXiv:2503.20083.

Dimensions: V student vocabulary, W teacher vocabulary, P pairs, E entries of all covers, C continuations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenkit.pairing.align import PairRule
from tokenkit.pairing.bias.covers import Covers, find_covers
from tokenkit.pairing.bias.rare import dropped_mass, frequent_continuations
from tokenkit.tokenization.tokenizer import Tokenizer

Floats = NDArray[np.float64]
Ids = NDArray[np.int32]
Progress = Callable[[int], None]
PARTNERS = 512  # compared at once: tokens of one letter have thousands of partners with large covers


@dataclass(frozen=True, slots=True)
class PairBiases:
    """Every pair of tokens of which one ends with the other, by teacher id, then student id."""

    teacher_P: Ids
    student_P: Ids
    teacher_bias_P: Floats
    """Probability that the teacher's end rules out and the student's does not."""
    student_bias_P: Floats
    shape: tuple[int, int]
    """W, V."""
    error_bounds: tuple[float, float] = (0.0, 0.0)
    """By how much a bias of the teacher, of the student may lie below its exact value; none lies above."""

    def pairs_below(self, threshold: float) -> tuple[Ids, Ids]:
        """Return teacher and student ids of the pairs whose biases are both at most `threshold`."""
        small_P = (self.teacher_bias_P <= threshold) & (self.student_bias_P <= threshold)
        return self.teacher_P[small_P], self.student_P[small_P]

    def rule(self, threshold: float) -> PairRule:
        """Return what `align_kinds` asks: whether a pair exists whose biases are both at most `threshold`."""
        teacher_P, student_P = self.pairs_below(threshold)
        key_P = teacher_P.astype(np.int64) * self.shape[1] + student_P

        def closes(teacher_C: Ids, student_C: Ids) -> NDArray[np.bool_]:
            return np.isin(teacher_C.astype(np.int64) * self.shape[1] + student_C, key_P)

        return closes


def find_biases(
    teacher: Tokenizer,
    student: Tokenizer,
    teacher_probability_W: Floats,
    student_probability_V: Floats,
    progress: Progress | None = None,
    *,
    min_probability: float = 0.0,
) -> PairBiases:
    """Return the biases of every pair.

    Args:
        teacher: the tokenizer of the teacher.
        student: the tokenizer that the student ends with.
        teacher_probability_W: unigram probability of each of its tokens.
        student_probability_V: the same for the student's.
        progress: called with the number of teacher tokens that are done.
        min_probability: continuations that end no token of this probability are left out; 0: none are.

    Raises:
        ValueError: if probabilities are of another vocabulary, or no pair exists.
    """
    for name, tokenizer, given in (
        ("teacher_probability_W", teacher, teacher_probability_W),
        ("student_probability_V", student, student_probability_V),
    ):
        if given.shape != (tokenizer.vocab_size,):
            raise ValueError(
                f"{name} must hold one number per token ({tokenizer.vocab_size}): got {given.shape}"
            )
    check_any_pair(teacher, student)
    pairs = find_pairs(teacher, student)
    sides = ((teacher, teacher_probability_W), (student, student_probability_V))
    kept, bounds = None, (0.0, 0.0)
    if min_probability > 0:
        kept = set().union(*(frequent_continuations(*side, min_probability) for side in sides))
        masses = [dropped_mass(*side, kept)[ids].max() for side, ids in zip(sides, pairs, strict=True)]
        bounds = (float(masses[0]), float(masses[1]))
    continuations = _Continuations()
    weighed = [_Weighed(continuations, *side, kept) for side in sides]
    teacher_bias_P, student_bias_P = _biases(
        pairs, (weighed[0], weighed[1]), len(continuations.number), progress
    )
    blank_P = _is_blank(teacher)[pairs[0]] | _is_blank(student)[pairs[1]]
    teacher_bias_P[blank_P] = student_bias_P[blank_P] = 1.0
    shape = (teacher.vocab_size, student.vocab_size)
    return PairBiases(*pairs, teacher_bias_P, student_bias_P, shape, bounds)


def check_any_pair(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raise ValueError if no token of the one ends with a token of the other."""
    if next(_endings(teacher, student), None) is None and next(_endings(student, teacher), None) is None:
        raise ValueError(
            f"tokenizers {teacher.spec} and {student.spec} share no bytes: no pair of tokens exists"
        )


def find_pairs(teacher: Tokenizer, student: Tokenizer) -> tuple[Ids, Ids]:
    """Return teacher and student ids of all text tokens of which one ends with the other, sorted."""
    found = np.array(
        sorted({*_endings(teacher, student), *((a, b) for b, a in _endings(student, teacher))}), np.int32
    ).reshape(-1, 2)
    return found[:, 0].copy(), found[:, 1].copy()


def _endings(longer: Tokenizer, shorter: Tokenizer) -> Iterator[tuple[int, int]]:
    """Yield (id, id) where the bytes of the first end with those of the second, or equal them."""
    ids_of: dict[bytes, list[int]] = defaultdict(list)
    for token_id, text in enumerate(shorter.token_bytes):
        if text and not shorter.is_special_V[token_id]:
            ids_of[text].append(token_id)
    for token_id, text in enumerate(longer.token_bytes):
        if not longer.is_special_V[token_id]:
            for start in range(len(text)):
                yield from ((token_id, other) for other in ids_of.get(text[start:], ()))


def _is_blank(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    return np.array([text.isspace() for text in tokenizer.token_bytes], np.bool_)


class _Continuations:
    """Numbers for byte strings: the same continuation has one number under both tokenizers."""

    def __init__(self) -> None:
        self.number: dict[bytes, int] = {}

    def of(self, tokenizer: Tokenizer, covers: Covers) -> Ids:
        """Return the number of each entry's continuation."""
        length_V = np.array([len(text) for text in tokenizer.token_bytes], np.int64)
        offset_V = np.concatenate([[0], np.cumsum(length_V)])
        number = self.number
        table = np.zeros(offset_V[-1], np.int32)
        for token_id in np.unique(covers.token_E).tolist():
            text, at = tokenizer.token_bytes[token_id], offset_V[token_id]
            for start in range(1, len(text)):
                table[at + start] = number.setdefault(text[start:], len(number))
        return table[offset_V[covers.token_E] + covers.inside_E]


class _Weighed:
    """A tokenizer's covers with the number and the probability of every entry."""

    def __init__(
        self,
        continuations: _Continuations,
        tokenizer: Tokenizer,
        probability_V: Floats,
        kept: set[bytes] | None,
    ) -> None:
        covers = find_covers(tokenizer, kept)
        self.offset_V = covers.offset_V
        self.number_E = continuations.of(tokenizer, covers)
        self.weight_E = probability_V[covers.token_E]

    def entries(self, token_id: int) -> slice:
        return slice(int(self.offset_V[token_id]), int(self.offset_V[token_id + 1]))


def _biases(
    pairs: tuple[Ids, Ids], sides: tuple[_Weighed, _Weighed], size: int, progress: Progress | None
) -> tuple[Floats, Floats]:
    """Compare covers, one teacher token with all its partners at a time; `size` numbers exist."""
    (teacher_P, student_P), (teacher, student) = pairs, sides
    teacher_bias_P, student_bias_P = np.zeros(len(teacher_P)), np.zeros(len(teacher_P))
    is_covered_C, weight_C = np.zeros(size, np.bool_), np.zeros(size)
    ids, first = np.unique(teacher_P, return_index=True)
    for token_id, begin, end in zip(ids.tolist(), first, [*first[1:], len(teacher_P)], strict=True):
        own = teacher.entries(token_id)
        number_E, weight_E = teacher.number_E[own], teacher.weight_E[own]
        total = weight_E.sum()
        is_covered_C[number_E], weight_C[number_E] = True, weight_E
        for start in range(begin, end, PARTNERS):
            here = slice(start, min(start + PARTNERS, end))
            place_E, partner_E = _ranges(student.offset_V, student_P[here])
            shared_E = is_covered_C[student.number_E[place_E]]
            count = here.stop - here.start
            student_bias_P[here] = np.bincount(partner_E, student.weight_E[place_E] * ~shared_E, count)
            place_E, partner_E = place_E[shared_E], partner_E[shared_E]
            overlap = np.bincount(partner_E, weight_C[student.number_E[place_E]], count)
            is_whole = np.bincount(partner_E, minlength=count) == len(number_E)  # exactly 0, not about 1e-17
            teacher_bias_P[here] = np.where(is_whole, 0, total - overlap)
        is_covered_C[number_E], weight_C[number_E] = False, 0.0
        if progress is not None:
            progress(1)
    return teacher_bias_P.clip(min=0), student_bias_P


def _ranges(offset_V: NDArray[np.int64], ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the entries of some tokens end to end, and to which of them each entry belongs."""
    begin, length = offset_V[ids], offset_V[ids + 1] - offset_V[ids]
    owner_E = np.repeat(np.arange(len(ids)), length)
    before = np.cumsum(length) - length
    return np.arange(len(owner_E)) - before[owner_E] + begin[owner_E], owner_E
