"""Documents to tokens: each tokenizer's own template, one axis for all of them, and the loss mask.

    student, teacher = encode_flat([Document(text="Hi")], (student_tokenizer, teacher_tokenizer))

The texts themselves are the same on every side, byte for byte (`canonical_text`), and nothing but text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import get_args

import numpy as np

from tokenkit.structs import Tokens
from tokenkit.tokenization.backend import Before
from tokenkit.tokenization.chat.assembly import Script, assemble, segments
from tokenkit.tokenization.chat.conversation import written_turns
from tokenkit.tokenization.chat.documents import Document, Message, document_from_row
from tokenkit.tokenization.chat.layout import Plan, layouts
from tokenkit.tokenization.options import ChatTemplateMode, LossMaskMode
from tokenkit.tokenization.ragged import EncodedTexts, FlatTokens, no_texts, split
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
