"""Gaps and texts of a batch put in a row: one side's tokens, all documents at once.

A document is written gap, text, gap, ..., gap: each of these is a *segment*. Their order and what is trained
in them are the same on every side; their tokens are not.

Dimensions: B documents, K texts, S segments, N tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

from tokenkit.structs import UNPAIRED
from tokenkit.tokenization.chat.layout import Gap, Plan
from tokenkit.tokenization.ragged import Bools, EncodedTexts, FlatTokens, Ints, offsets


class Script(NamedTuple):
    """A document as texts and the plan of what is written around them."""

    plan: Plan
    texts: list[str]
    trained: tuple[bool, ...]
    """Of each text; of the last part, where a text has parts."""
    parts: tuple[tuple[str, bool], ...] = ()
    """A plain text in pieces of which some are not trained; nothing: the text is of one piece."""


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a batch, document by document."""

    row_S: Ints
    """Row in the table that holds all gaps of all plans, and the texts below them."""
    trained_S: Bools
    """All tokens of the segment are trained."""
    closes_trained_S: Bools
    """A gap behind a trained text: its tokens that close that text are trained."""
    opens_trained_S: Bools
    """A gap before a trained text: its tokens that open that text are trained."""
    offset_B: Ints
    """[B + 1] document b is segments offset[b] to offset[b + 1], end exclusive."""
    parts: tuple[Ints, Bools] | None
    """Where texts are of several parts: the `_key` of each part's beginning, rising, and if it is trained."""


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
        tuple([not (script.plan.roles or script.parts) for script in scripts]),
        tuple([_part_starts(script.parts) if script.parts else () for script in scripts]),
        trains_all,
    )


def _part_starts(parts: tuple[tuple[str, bool], ...]) -> tuple[tuple[int, bool], ...]:
    """Return the byte at which each part begins, and whether it is trained."""
    ends = accumulate(len(text.encode()) for text, _ in parts)
    return tuple((start, trained) for start, (_, trained) in zip((0, *ends), parts, strict=False))


@functools.lru_cache(maxsize=64)  # batches of plain text have one order
def _segments(
    texts_of_plan: tuple[int, ...],
    plan_B: tuple[int, ...],
    trained_K: tuple[bool, ...],
    trains_gaps_B: tuple[bool, ...],
    parts_B: tuple[tuple[tuple[int, bool], ...], ...],
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
    opens_trained_S = np.append(trained_S[1:], False)
    trained_S |= trains_all | (~is_text_S & np.repeat(trains_gaps_B, size_B))
    parts = None
    if any(parts_B) and not trains_all:
        by_segment: list[tuple[tuple[int, bool], ...]] = [((0, trained),) for trained in trained_S.tolist()]
        for first, own in zip(offset_B.tolist(), parts_B, strict=False):
            if own:
                by_segment[first + 1] = own  # a document with parts has one text
        starts = [(s, start) for s, own in enumerate(by_segment) for start, _ in own]
        keys = np.array([_key(s, start) for s, start in starts], np.int64)
        parts = keys, np.array([trained for own in by_segment for _, trained in own], bool)
    return Segments(row_S, trained_S, closes_trained_S, opens_trained_S, offset_B, parts)


def _key(segment: Any, byte: Any) -> Any:
    """Return a number that sorts the bytes of all segments: ints, or arrays of them."""
    return (segment << 40) + byte  # a text of 2**40 bytes fits in no memory


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
        for flags, neighbour_S in (
            ([gap.closes for gap in gaps], order.closes_trained_S),
            ([gap.opens for gap in gaps], order.opens_trained_S),
        ):
            own = np.concatenate(flags)[from_N[template]]
            trained_N[template] |= own & np.repeat(neighbour_S, length_S)[template]
    if order.parts is not None:
        own_start_N = np.append(0, own_end_N[:-1])
        own_start_N[offset_S[:-1][length_S > 0]] = 0
        keys, is_trained = order.parts
        key_N = _key(np.repeat(np.arange(len(length_S)), length_S), np.maximum(own_start_N, 0))
        in_part_N = is_trained[np.searchsorted(keys, key_N, side="right") - 1]
        trained_N = np.where(special_N, trained_N, in_part_N)
    return FlatTokens(ids_N, ends_N, special_N, trained_N, offset_S[order.offset_B])
