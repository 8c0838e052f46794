"""Gaps and texts of a batch put in a row: one side's tokens, all documents at once.

A document is written gap, text, gap, ..., gap: each of these is a *segment*. Their order and what is trained
in them are the same on every side; their tokens are not.

Dimensions: B documents, K texts, S segments, N tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from tokenkit.structs import UNPAIRED
from tokenkit.tokenization.flat import Bools, EncodedTexts, FlatTokens, Ints, offsets
from tokenkit.tokenization.layout import Gap, Plan


class Script(NamedTuple):
    """A document as texts and the plan of what is written around them."""

    plan: Plan
    texts: list[str]
    trained: tuple[bool, ...]
    prompt: str = ""
    """The beginning of a plain text that is not trained."""


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a batch, document by document."""

    row_S: Ints
    """Row in the table that holds all gaps of all plans, and the texts below them."""
    trained_S: Bools
    """All tokens of the segment are trained."""
    closes_trained_S: Bools
    """A gap behind a trained text: its tokens that close that text are trained."""
    offset_B: Ints
    """[B + 1] document b is segments offset[b] to offset[b + 1], end exclusive."""
    prompt_S: Ints | None
    """Bytes at the beginning of a trained text that are not; None: nowhere."""


def segments(
    scripts: Sequence[Script], plans: Sequence[Plan], plan_B: Sequence[int], *, trains_all: bool
) -> Segments:
    """Return the order of gaps and texts.

    Args:
        scripts: the documents.
        plans: the plans of the documents, each once: the order of their gaps in the table.
        plan_B: the number of each document's plan.
        trains_all: every token is trained.
    """
    return _segments(
        tuple(plan.texts for plan in plans),
        tuple(plan_B),
        tuple(chain.from_iterable([script.trained for script in scripts])),
        tuple([not (script.plan.roles or script.prompt) for script in scripts]),
        tuple([len(script.prompt.encode()) for script in scripts]),
        trains_all,
    )


@functools.lru_cache(maxsize=64)  # batches of plain text have one order
def _segments(
    texts_of_plan: tuple[int, ...],
    plan_B: tuple[int, ...],
    trained_K: tuple[bool, ...],
    trains_gaps_B: tuple[bool, ...],
    prompt_B: tuple[int, ...],
    trains_all: bool,
) -> Segments:
    gap_offset = offsets([texts + 1 for texts in texts_of_plan])
    plan_index_B = np.array(plan_B, np.int64)
    size_B = 2 * np.array(texts_of_plan, np.int64)[plan_index_B] + 1
    offset_B = offsets(size_B)
    place_S = np.arange(offset_B[-1]) - np.repeat(offset_B[:-1], size_B)
    is_text_S = place_S % 2 == 1
    gap_S = np.repeat(gap_offset[plan_index_B], size_B) + place_S // 2
    row_S = np.where(is_text_S, gap_offset[-1] + np.cumsum(is_text_S) - 1, gap_S)
    trained_S = np.zeros(len(row_S), bool)
    trained_S[is_text_S] = trained_K
    closes_trained_S = np.zeros(len(row_S), bool)
    closes_trained_S[1:] = trained_S[:-1]
    trained_S |= trains_all | (~is_text_S & np.repeat(trains_gaps_B, size_B))
    prompt_S = None
    if any(prompt_B) and not trains_all:
        prompt_S = np.repeat(np.array(prompt_B, np.int64), size_B) * is_text_S
    return Segments(row_S, trained_S, closes_trained_S, offset_B, prompt_S)


def assemble(order: Segments, gaps: Sequence[Gap], texts: EncodedTexts) -> FlatTokens:
    """Write the segments of one side.

    Args:
        order: the segments.
        gaps: the gaps of all plans, in the table's order.
        texts: the texts of all documents.
    """
    gap_length = np.array([len(gap.ids) for gap in gaps], np.int64)
    gap_width = np.array([gap.width for gap in gaps], np.int64)
    gap_offset = offsets(gap_length)
    gap_tokens = gap_offset[-1]
    start_S = np.concatenate([gap_offset[:-1], texts.start_K + gap_tokens])[order.row_S]
    length_S = np.concatenate([gap_length, texts.length_K])[order.row_S]
    width_S = np.concatenate([gap_width, texts.width_K])[order.row_S]
    place_S = offsets(width_S)
    place_S = place_S[:-1] - np.repeat(place_S[order.offset_B[:-1]], np.diff(order.offset_B))
    offset_S = offsets(length_S)

    from_N = np.arange(offset_S[-1]) + np.repeat(start_S - offset_S[:-1], length_S)
    ids_N = np.concatenate([*(gap.ids for gap in gaps), texts.ids_N])[from_N]
    own_end_N = np.concatenate([*(gap.ends for gap in gaps), texts.ends_N])[from_N]
    ends_N = own_end_N + np.repeat(place_S, length_S)
    special_N = from_N < gap_tokens
    template = np.flatnonzero(special_N)
    ends_N[template[own_end_N[template] == UNPAIRED]] = UNPAIRED
    trained_N = np.repeat(order.trained_S, length_S)
    if not order.trained_S.all():
        closes = np.concatenate([gap.closes for gap in gaps])[from_N[template]]
        trained_N[template] |= closes & np.repeat(order.closes_trained_S, length_S)[template]
    if order.prompt_S is not None:
        own_start_N = np.append(0, own_end_N[:-1])
        own_start_N[offset_S[:-1][length_S > 0]] = 0
        trained_N &= special_N | (own_start_N >= np.repeat(order.prompt_S, length_S))
    return FlatTokens(ids_N, ends_N, special_N, trained_N, offset_S[order.offset_B])
