"""Chat templates (Jinja): reading the pieces out of one.

A template is rendered on conversations of marker words; what stands between the markers is the template's
own. Headers and ends are told apart by comparing a turn that another one follows with one that is last.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from tokenkit.errors import TemplateError
from tokenkit.tokenization.chat.families import (
    AFTER_TURN,
    BOS,
    END_TURN,
    EOS,
    HEADER,
    NEXT_HEADER,
    Family,
    Piece,
    Turn,
)
from tokenkit.tokenization.chat.rendering import render

_PADDING = "  "
_MARKER = re.compile(r"Marker\d+Word")
_SPELLED_ROLE = re.compile(r"(\w+)(\s*)")


class Marked(Protocol):
    """`marked` of one template."""

    def __call__(self, roles: Sequence[str], padding: str = "", *, generates: bool = False) -> list[str]:
        """Return what stands before, between and after the marker words of these roles."""


def token_names(tokens: Mapping[str, str]) -> dict[str, str]:
    """Return the special tokens under the names that templates know."""
    return {f"{role}_token": string for role, string in tokens.items()}


def marked(
    chat_template: str,
    tokens: Mapping[str, str],
    roles: Sequence[str],
    padding: str = "",
    *,
    generates: bool = False,
) -> list[str]:
    """Return what a template writes before, between and after the messages of these roles.

    Args:
        chat_template: Jinja.
        tokens: role to special token.
        roles: of the messages.
        padding: whitespace around each message.
        generates: an answer is opened at the end.

    Raises:
        TemplateError: the template fails, or does not write each message once and in order.
    """
    markers = [f"Marker{index}Word" for index in range(len(roles))]
    messages = [
        {"role": role, "content": padding + marker + padding}
        for role, marker in zip(roles, markers, strict=True)
    ]
    written = render(chat_template, messages, names=token_names(tokens), add_generation_prompt=generates)
    if _MARKER.findall(written) != markers:
        raise TemplateError("it does not write each message once and in order")
    return _MARKER.split(written)


def family_of_template(family: Family, chat_template: str, control: Collection[str]) -> Family:
    """Return the family with the turns of a chat template.

    What a template writes beside the turns (a system prompt of its own, a date, an empty block of thinking)
    is in none of them: `layout` finds it where a conversation is written. A template that puts a system text
    in front of the first user's counts as one without system turns.

    Raises:
        ValueError: a template that fails, or does not write a conversation turn by turn.
    """
    own = partial(marked, chat_template, family.tokens)
    try:
        first, to_answer, to_user, _, end = own(("user", "assistant", "user", "assistant"))
        *_, last_user = own(("user", "assistant", "user"))
        answer_behind_padding = own(("user", "assistant"), _PADDING)[1]
    except ValueError as error:
        raise ValueError(
            f"the chat template cannot be read ({error}): name a family with ':target=' in the tokenizer spec"
        ) from error
    split = _Splitter(control)
    assistant_end, user_header = split.shared_start(to_user, end)
    user_end, assistant_header = split.shared_start(to_answer, last_user)
    bos, eos = family.tokens.get(BOS, ""), family.tokens.get(EOS, "")
    # a token in front of answers too is no BOS but the start of a turn
    repeats_bos = bool(bos) and first == user_header and user_header.startswith(bos)
    repeats_bos = repeats_bos and not assistant_header.startswith(bos)
    # the template alone decides: transformers writes no BOS of its own in front of a rendered conversation
    starts = bos + user_header if user_header.startswith(bos) else bos
    writes_bos = repeats_bos or (bool(bos) and first.startswith(starts))
    user_header = user_header.removeprefix(bos) if repeats_bos else user_header
    turns = {
        "user": Turn(split.header(user_header, assistant_header), split.end(user_end)),
        "assistant": Turn(split.header(assistant_header, user_header), split.end(assistant_end)),
    }
    if not assistant_header.strip(" "):
        # `[/INST] ` closes the question and opens the answer, with its space.
        closing = (Piece(user_end + assistant_header, (END_TURN, *NEXT_HEADER)),)
        turns["user"] = replace(turns["user"], end=closing)
        turns["assistant"] = replace(turns["assistant"], header=())
    others = _system_turn(own, split, bos if writes_bos else "", user_header)
    joins = others.pop("", None)
    tool = _tool_turn(own, split, assistant_end, assistant_header)
    if tool is not None and tool != turns["user"]:
        others["tool"] = tool
    return replace(
        family,
        turns=turns | others,
        joins_system=family.joins_system if joins is None else joins.header[0].text,
        writes_bos=writes_bos,
        repeats_bos=repeats_bos,
        ends_chat_with_eos=bool(eos) and end == assistant_end + eos,
        trims_content=not answer_behind_padding.startswith(_PADDING),
    )


def tokens_by_role(family: Family, chat_template: str | None, control: Collection[str]) -> dict[str, str]:
    """Return the family's special tokens by role, and those that its turns are written with.

    Turns have the roles `start`, `end_header` and `end_turn`; a special token that is a whole header has the
    name of the message's role. A question's end is none: a model that stops there does not stop at its own.
    A template that cannot be read says nothing.
    """
    if not family.turns and chat_template is not None:
        with suppress(ValueError):
            family = family_of_template(family, chat_template, control)
    roles = dict(family.tokens)
    if not family.turns:
        return roles
    for message_role in ("assistant", *family.turns):
        turn = family.turns[message_role]
        for piece in (*turn.header, *turn.end):
            string = piece.text.strip()
            is_header = piece.atoms == HEADER
            if string not in control or (is_header and string in family.tokens.values()):
                continue
            if piece.atoms[0] != END_TURN or message_role == "assistant":
                roles.setdefault(message_role if is_header else piece.atoms[0], string)
    return roles


def _system_turn(own: Marked, split: _Splitter, bos: str, user_header: str) -> dict[str, Turn]:
    """Return how a leading system message is written; nothing where a template has no word for it.

    Where it goes in front of the user's text the turn's name is empty, and its header what stands between.
    """
    try:
        before, between, *_ = own(("system", "user", "assistant"))
    except TemplateError:
        return {}
    with suppress(TemplateError):
        as_answer = own(("assistant", "user", "assistant"))
        if as_answer[:2] == [before, between]:
            return {}  # no branch of its own: it would be written as something that the model said
    header = before.removeprefix(bos)
    if not between.strip() and between and before.endswith(user_header):
        return {"": Turn((Piece(between, ()),), ())}
    if not user_header:
        return {}
    if not between.endswith(user_header):
        # `[INST] <<SYS>> text <</SYS>> question [/INST]`: in the user's turn, with words of its own
        return (
            {"system": Turn((Piece(header, HEADER),), (Piece(between, (END_TURN,)),))}
            if between and header
            else {}
        )
    # What a template adds behind the header (a date, a default prompt) is not the message's.
    spelled = user_header.replace("user", "system")
    header = spelled if header.startswith(spelled) else header
    return {"system": Turn(split.header(header, user_header), split.end(between.removesuffix(user_header)))}


def _tool_turn(own: Marked, split: _Splitter, answer_end: str, answer_header: str) -> Turn | None:
    """Return how a tool's answer is written; None where a template has no turn for it."""
    try:
        _, _, before, after, _ = own(("user", "assistant", "tool", "assistant"))
    except TemplateError:
        return None
    header, end = before.removeprefix(answer_end), after.removesuffix(answer_header)
    if not before.startswith(answer_end) or not header.strip() or not after.endswith(answer_header):
        return None
    return Turn(split.header(header, answer_header), split.end(end))


class _Splitter:
    """Cuts template text at its special tokens."""

    def __init__(self, control: Collection[str]) -> None:
        self.control = set(control)
        strings = sorted(self.control, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, strings)) + ")") if strings else None

    def elements(self, text: str) -> list[str]:
        """Return special tokens and the texts between them."""
        return [part for part in (self._pattern.split(text) if self._pattern else [text]) if part]

    def shared_start(self, longer: str, shorter: str) -> tuple[str, str]:
        """Return what both begin with, in whole elements, and the rest of the first.

        A last element of text counts where one side's begins with the other's.
        """
        shared = []
        for mine, other in zip(self.elements(longer), self.elements(shorter), strict=False):
            if mine == other:
                shared.append(mine)
                continue
            if not {mine, other} & self.control and mine.startswith(other):
                shared.append(other)
            break
        start = "".join(shared)
        return start, longer[len(start) :]

    def header(self, header: str, other: str) -> tuple[Piece, ...]:
        """Return the pieces of a header; one piece where the role's name is not a word of its own."""
        mine, others = self.elements(header), self.elements(other)
        differing = [i for i, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b]
        if len(mine) == len(others) and len(differing) == 1:
            at = differing[0]
            if mine[at] not in self.control and (match := _SPELLED_ROLE.fullmatch(mine[at])):
                texts = ("".join(mine[:at]), match[1], match[2] + "".join(mine[at + 1 :]))
                return tuple(Piece(t, (atom,)) for t, atom in zip(texts, HEADER, strict=True) if t)
        return (Piece(header, HEADER),) if header else ()

    def end(self, text: str) -> tuple[Piece, ...]:
        """Return the pieces of a turn's end: up to its first special token, and what follows."""
        elements = self.elements(text)
        at = next((i for i, element in enumerate(elements) if element in self.control), len(elements) - 1)
        texts = ("".join(elements[: at + 1]), "".join(elements[at + 1 :]))
        return tuple(Piece(t, (a,)) for t, a in zip(texts, (END_TURN, AFTER_TURN), strict=True) if t)
