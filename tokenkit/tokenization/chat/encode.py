"""Documents to tokens: each tokenizer's own template, one axis for all of them, and the loss mask.

    student, teacher = encode_flat([Document(text="Hi")], (student_tokenizer, teacher_tokenizer))

The texts themselves are the same on every side, byte for byte (`canonical_text`), and nothing but text.
A document is written gap, text, gap, ..., gap: each of these is a *segment*. Their order and what is trained
in them are the same on every side; their tokens are not.

Dimensions: B documents, K texts, S segments, N tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple, get_args

import numpy as np

from tokenkit.structs import UNPAIRED, Tokens
from tokenkit.tokenization.backend import Before
from tokenkit.tokenization.chat.conversation import written_turns
from tokenkit.tokenization.chat.documents import Document, Message, document_from_row
from tokenkit.tokenization.chat.layout import Gap, Plan, layouts
from tokenkit.tokenization.options import ChatTemplateMode, LossMaskMode
from tokenkit.tokenization.ragged import Bools, EncodedTexts, FlatTokens, Ints, no_texts, offsets, split
from tokenkit.tokenization.tokenizer import Tokenizer, canonical_text

__all__ = [
    "ChatTemplateMode",
    "Document",
    "LossMaskMode",
    "Message",
    "document_from_row",
    "encode_documents",
    "encode_flat",
]

CANNOT_SPELL = "cannot spell"
"""In the reason why a document cannot be written: its vocabulary lacks bytes."""


def encode_flat(
    documents: Sequence[Document],
    tokenizers: Sequence[Tokenizer],
    *,
    mode: str = "surround_instruct",
    loss_mask_mode: str | None = None,
    use_chat_template: bool = True,
) -> tuple[FlatTokens, ...]:
    """Encode documents with one or two tokenizers, along one axis per document.

    Args:
        documents: plain texts and conversations.
        tokenizers: student and teacher, or one of them. The first one's template decides what the texts of a
            conversation are; the others write the same texts with their own.
        mode: how plain text is written. `surround_instruct`: as the assistant's answer to an empty user
            turn; `direct_encode`: BOS (where the tokenizer writes one), text, EOS; with `_no_force_bos`,
            `_no_force_eos` or both behind it, without these.
            Conversations are written with the template in every mode; a prompt and its completion
            are one plain text in the direct modes.
        use_chat_template: False: a conversation is one plain text too, its messages a line or more each, and
            no tokenizer needs a template. Not with `surround_instruct`.
        loss_mask_mode: None or `assistant`: the text and end of each assistant turn, the completion of a
            prompt, or all of a plain text. `all`: every token.

    Returns:
        All documents for each tokenizer.

    Raises:
        ValueError: an unknown mode, or a document that cannot be written (the reason is short).
    """
    _check_modes(mode, loss_mask_mode, use_chat_template)
    pair = tuple(tokenizers)
    scripts = [_script(document, pair, mode, use_chat_template) for document in documents]
    plans = list({script.plan: None for script in scripts})
    gaps = [layouts(plan, pair) for plan in plans]
    number_of = {plan: number for number, plan in enumerate(plans)}
    plan_B = [number_of[script.plan] for script in scripts]
    places = []
    for side in range(len(pair)):
        of_plan = [[gap.before for gap in sides[side][:-1]] for sides in gaps]
        places.append(list(chain.from_iterable(of_plan[number] for number in plan_B)))
    scripts, encoded = _encode_texts(scripts, pair, places)
    order = segments(scripts, plans, plan_B, trains_all=loss_mask_mode == "all")
    return tuple(
        assemble(order, [gap for sides in gaps for gap in sides[side]], texts)
        for side, texts in enumerate(encoded)
    )


def encode_documents(
    documents: Sequence[Document],
    tokenizers: Sequence[Tokenizer],
    *,
    mode: str = "surround_instruct",
    loss_mask_mode: str | None = None,
    use_chat_template: bool = True,
) -> list[tuple[Tokens, ...]]:
    """Encode documents one by one: for each, one `Tokens` per tokenizer. Otherwise as `encode_flat`."""
    sides = encode_flat(
        documents,
        tokenizers,
        mode=mode,
        loss_mask_mode=loss_mask_mode,
        use_chat_template=use_chat_template,
    )
    return list(zip(*map(split, sides), strict=True))


def _check_modes(mode: str, loss_mask_mode: str | None, use_chat_template: bool) -> None:
    if mode not in get_args(ChatTemplateMode):
        raise ValueError(
            f"chat_template_mode is one of {', '.join(get_args(ChatTemplateMode))}: got {mode!r}"
        )
    if loss_mask_mode is not None and loss_mask_mode not in get_args(LossMaskMode):
        raise ValueError(
            f"loss_mask_mode is one of {', '.join(get_args(LossMaskMode))}: got {loss_mask_mode!r}"
        )
    if mode == "surround_instruct" and not use_chat_template:
        raise ValueError(
            "chat_template_mode surround_instruct writes a template, and use_chat_template is false: "
            "choose a direct mode"
        )


def _script(document: Document, tokenizers: tuple[Tokenizer, ...], mode: str, use_template: bool) -> Script:
    if document.text is not None and mode != "surround_instruct":
        return Script(_plain_plan(mode), [document.text], (True,))
    if mode != "surround_instruct" and (document.is_pair or not use_template):
        said = document.messages or ()
        if document.tools or any(message.calls or message.reasoning for message in said):
            raise ValueError("tool calls, tools or reasoning, which only a chat template writes")
        end = "" if document.is_pair else "\n"
        contents = [message.content + end for message in said[:-1]] + [said[-1].content]
        trained = [message.is_trained for message in said]
        parts = tuple(zip(contents, trained, strict=True))
        return Script(_plain_plan(mode), ["".join(contents)], (trained[-1],), parts)
    student, is_whole = tokenizers[0], False
    if document.messages is None:
        text = document.text or ""
        turns = [
            Message("user", ""),
            Message("assistant", text.strip() if student.chat.trims_content else text),
        ]
    else:
        turns, is_whole = written_turns(document, student)
    return Script(
        Plan(tuple([turn.role for turn in turns]), writes_bos=True, writes_eos=True, is_whole=is_whole),
        [turn.content for turn in turns],
        tuple([turn.is_trained for turn in turns]),
    )


@functools.cache
def _plain_plan(mode: str) -> Plan:
    return Plan((), writes_bos="no_force_bos" not in mode, writes_eos="no_force_eos" not in mode)


def _encode_texts(
    scripts: list[Script], tokenizers: Sequence[Tokenizer], places: Sequence[Sequence[Before]]
) -> tuple[list[Script], list[EncodedTexts]]:
    """Encode all texts of all documents, once per tokenizer; texts become canonical on the way."""
    texts = [text for script in scripts for text in script.texts]
    encoded = _encode_by_place(tokenizers, texts, places)
    if all(side.is_spelled_K.all() for side in encoded):
        return scripts, encoded
    changed = np.flatnonzero(~np.logical_and.reduce([side.is_spelled_K for side in encoded])).tolist()
    canonical = [canonical_text(texts[index], *tokenizers) for index in changed]
    again = _encode_by_place(tokenizers, canonical, [[place[index] for index in changed] for place in places])
    for tokenizer, side in zip(tokenizers, again, strict=True):
        if not side.is_spelled_K.all():
            raise ValueError(f"text that tokenizer {tokenizer.spec} {CANNOT_SPELL}")
    encoded = [side.replaced(changed, other) for side, other in zip(encoded, again, strict=True)]
    for index, text in zip(changed, canonical, strict=True):
        texts[index] = text
    remaining = iter(texts)
    result = []
    for script in scripts:
        own = [next(remaining) for _ in script.texts]
        if not any(own):
            raise ValueError("empty document")
        if own != script.texts:  # else the neighbours of a document would move where its parts meet
            script = script._replace(texts=own, parts=_canonical_parts(script.parts, tokenizers))
        result.append(script)
    return result, encoded


def _canonical_parts(
    parts: tuple[tuple[str, bool], ...], tokenizers: Sequence[Tokenizer]
) -> tuple[tuple[str, bool], ...]:
    """Return the parts of the canonical text: each ends where the canonical text up to it does."""
    wholes = [canonical_text(text, *tokenizers) for text in accumulate(text for text, _ in parts)]
    begins = [0, *map(len, wholes)]
    return tuple(
        (whole[begin:], trained) for whole, begin, (_, trained) in zip(wholes, begins, parts, strict=False)
    )


def _encode_by_place(
    tokenizers: Sequence[Tokenizer], texts: Sequence[str], places: Sequence[Sequence[Before]]
) -> list[EncodedTexts]:
    """Encode texts with each tokenizer, in one call for each place that they stand in."""
    calls = []
    for side, (tokenizer, place) in enumerate(zip(tokenizers, places, strict=True)):
        for before in sorted(set(place)):
            chosen = [index for index, other in enumerate(place) if other == before]
            own = texts if len(chosen) == len(texts) else [texts[index] for index in chosen]
            calls.append((side, chosen, tokenizer.cut_texts(own, before)))
    result: list[EncodedTexts | None] = [None] * len(tokenizers)
    for side, chosen, cut in calls:
        encoded = tokenizers[side].placed(cut)
        if len(chosen) < len(texts):
            encoded = (result[side] or no_texts(len(texts))).replaced(chosen, encoded)
        result[side] = encoded
    return [encoded or no_texts(0) for encoded in result]


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
