"""Documents to tokens: each tokenizer's own template, one axis for all of them, and the loss mask.

    (student, teacher), = encode_documents([Document(text="Hi")], (student_tokenizer, teacher_tokenizer))

The texts themselves are the same on every side, byte for byte (`canonical_text`), and nothing but text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tokenkit.structs import UNPAIRED, Tokens
from tokenkit.tokenization.backend import Before
from tokenkit.tokenization.byteify import Tokenizer, canonical_text
from tokenkit.tokenization.documents import Document, Message, document_from_row
from tokenkit.tokenization.layout import Gap, Plan, layouts

__all__ = ["ChatTemplateMode", "Document", "LossMaskMode", "Message", "document_from_row", "encode_documents"]

ChatTemplateMode = Literal[
    "surround_instruct",
    "direct_encode",
    "direct_encode_no_force_eos",
    "direct_encode_no_force_bos",
    "direct_encode_no_force_bos_no_force_eos",
]
LossMaskMode = Literal["assistant", "all"]


@dataclass
class _Script:
    """A document as texts and the plan of what is written around them."""

    plan: Plan
    texts: list[str]
    trained: list[bool]
    prompt: str = ""
    """The beginning of a plain text that is not trained."""


def encode_documents(
    documents: Sequence[Document],
    tokenizers: Sequence[Tokenizer],
    *,
    mode: str = "surround_instruct",
    loss_mask_mode: str | None = None,
) -> list[tuple[Tokens, ...]]:
    """Encode documents with one or two tokenizers, along one axis per document.

    Args:
        documents: plain texts and conversations.
        tokenizers: student and teacher, or one of them.
        mode: how plain text is written. `surround_instruct`: as the assistant's answer to an empty user
            turn; `direct_encode`: BOS (where the tokenizer writes one), text, EOS; with `_no_force_bos`,
            `_no_force_eos` or both behind it, without these.
            Conversations are written with the template in every mode; a prompt and its completion
            are one plain text in the direct modes.
        loss_mask_mode: None or `assistant`: the text and end of each assistant turn, the completion of a
            prompt, or all of a plain text. `all`: every token.

    Returns:
        For each document one `Tokens` per tokenizer.

    Raises:
        ValueError: an unknown mode, or a document that cannot be written (the reason is short).
    """
    _check_modes(mode, loss_mask_mode)
    scripts = [_script(document, tokenizers, mode) for document in documents]
    layout_of = {plan: layouts(plan, tuple(tokenizers)) for plan in {script.plan for script in scripts}}
    gaps = [[layout_of[script.plan][side] for script in scripts] for side in range(len(tokenizers))]
    encoded = _encode_texts(scripts, tokenizers, gaps)
    sides = []
    for gaps_of_side, tokens_of_side in zip(gaps, encoded, strict=True):
        remaining = iter(tokens_of_side)
        texts = [[next(remaining) for _ in script.texts] for script in scripts]
        written = zip(scripts, gaps_of_side, texts, strict=True)
        sides.append([_assemble(*document, trains_all=loss_mask_mode == "all") for document in written])
    return list(zip(*sides, strict=True))


def _check_modes(mode: str, loss_mask_mode: str | None) -> None:
    if mode not in get_args(ChatTemplateMode):
        raise ValueError(
            f"chat_template_mode is one of {', '.join(get_args(ChatTemplateMode))}: got {mode!r}"
        )
    if loss_mask_mode is not None and loss_mask_mode not in get_args(LossMaskMode):
        raise ValueError(
            f"loss_mask_mode is one of {', '.join(get_args(LossMaskMode))}: got {loss_mask_mode!r}"
        )


def _script(document: Document, tokenizers: Sequence[Tokenizer], mode: str) -> _Script:
    if mode != "surround_instruct" and (document.text is not None or document.is_pair):
        contents = [m.content for m in document.messages or ()]
        plan = Plan((), writes_bos="no_force_bos" not in mode, writes_eos="no_force_eos" not in mode)
        text = document.text if document.text is not None else "".join(contents)
        return _Script(plan, [text], [True], prompt=contents[0] if contents else "")
    surrounded = (Message("user", ""), Message("assistant", document.text or ""))
    families = [tokenizer.chat for tokenizer in tokenizers]
    messages = _writable(
        document.messages or surrounded, set.intersection(*(set(family.turns) for family in families))
    )
    trims = any(family.trims_content for family in families)
    return _Script(
        Plan(tuple(message.role for message in messages), writes_bos=True, writes_eos=True),
        [message.content.strip() if trims else message.content for message in messages],
        [message.is_trained for message in messages],
    )


def _writable(messages: Sequence[Message], roles: set[str]) -> list[Message]:
    """Give messages whose role some template lacks to the user: the same text on every side.

    A system message goes in front of the user message that follows; what tools say is said by the user.
    """
    result: list[Message] = []
    system: list[str] = []
    for message in messages:
        if message.role in roles:
            if message.role == "user" and system:
                message = replace(message, content="\n\n".join([*system, message.content]))
                system = []
            result.append(message)
        elif message.role == "system":
            system.append(message.content)
        else:
            result.append(replace(message, role="user"))
    if system:
        result.append(Message("user", "\n\n".join(system)))
    return result


def _encode_texts(
    scripts: Sequence[_Script], tokenizers: Sequence[Tokenizer], gaps: Sequence[Sequence[Sequence[Gap]]]
) -> list[list[Tokens]]:
    """Encode all texts of all documents, one list per tokenizer; texts become canonical on the way."""
    texts = [text for script in scripts for text in script.texts]
    places = [[gap.before for document in side for gap in document[:-1]] for side in gaps]
    encoded = [_encode_by_place(t, texts, place) for t, place in zip(tokenizers, places, strict=True)]
    changed = [index for index, tokens in enumerate(zip(*encoded, strict=True)) if None in tokens]
    if changed:
        canonical = [canonical_text(texts[index], *tokenizers) for index in changed]
        for tokenizer, place, tokens_of_side in zip(tokenizers, places, encoded, strict=True):
            again = _encode_by_place(tokenizer, canonical, [place[index] for index in changed])
            for index, tokens in zip(changed, again, strict=True):
                if tokens is None:
                    raise ValueError(f"text that tokenizer {tokenizer.spec} cannot spell")
                tokens_of_side[index] = tokens
        for index, text in zip(changed, canonical, strict=True):
            texts[index] = text
    remaining = iter(texts)
    for script in scripts:
        script.texts = [next(remaining) for _ in script.texts]
        if not any(script.texts):
            raise ValueError("empty document")
        if changed and script.prompt:
            script.prompt = canonical_text(script.prompt, *tokenizers)
    return encoded  # type: ignore[return-value]  # no None is left


def _encode_by_place(
    tokenizer: Tokenizer, texts: Sequence[str], places: Sequence[Before]
) -> list[Tokens | None]:
    """Encode texts in one call for each place that they stand in."""
    if len(set(places)) == 1:
        return tokenizer.try_encode_batch(texts, places[0])
    result: list[Tokens | None] = [None] * len(texts)
    for place in set(places):
        chosen = [index for index, other in enumerate(places) if other == place]
        encoded = tokenizer.try_encode_batch([texts[index] for index in chosen], place)
        for index, tokens in zip(chosen, encoded, strict=True):
            result[index] = tokens
    return result


def _assemble(script: _Script, gaps: Sequence[Gap], texts: Sequence[Tokens], *, trains_all: bool) -> Tokens:
    """Put the gaps and texts of one document in a row."""
    length = sum(len(gap.ids) for gap in gaps) + sum(len(tokens.ids) for tokens in texts)
    ids, ends = np.empty(length, np.int32), np.empty(length, np.int64)
    special, trained = np.ones(length, bool), np.zeros(length, bool)
    trains_gaps = trains_all or not (script.plan.roles or script.prompt)
    at, position, trains_text = 0, 0, False
    for index, gap in enumerate(gaps):
        if len(gap.ids):
            here = slice(at, at + len(gap.ids))
            ids[here] = gap.ids
            ends[here] = gap.ends + position
            ends[here][gap.ends == UNPAIRED] = UNPAIRED
            if trains_gaps or trains_text:
                trained[here] = trains_gaps or gap.closes
            at += len(gap.ids)
        position += gap.width
        if index == len(texts):
            break
        tokens, trains_text = texts[index], script.trained[index]
        here = slice(at, at + len(tokens.ids))
        ids[here] = tokens.ids
        ends[here] = tokens.byte_ends + position
        special[here] = False
        if trains_all or trains_text:
            trained[here] = trains_all or _trained(script, tokens)
        at += len(tokens.ids)
        position += int(tokens.byte_ends[-1]) if len(tokens.ids) else 0
    return Tokens(ids, ends, special, trained)


def _trained(script: _Script, tokens: Tokens) -> bool | NDArray[np.bool_]:
    """Return which tokens of a trained text are: behind a prompt, those that begin in the completion."""
    if not script.prompt:
        return True
    starts = np.concatenate([[0], tokens.byte_ends[:-1]])
    return starts >= len(script.prompt.encode())
