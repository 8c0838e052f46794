"""A conversation as the turns that are written: what the student's template makes of a row.

The student is what a run exports, so its template decides: a message of `messages` here has a role that the
template has a turn for, and its text is all that the template writes between header and end of the turn.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenkit.errors import TemplateError
from tokenkit.tokenization.chat.documents import Document, Message
from tokenkit.tokenization.chat.layout import CONTINUES, around_turns, special_pattern
from tokenkit.tokenization.chat.rendering import render
from tokenkit.tokenization.chat.template import token_names
from tokenkit.tokenization.files.saving import exported_template, has_own_template

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

_THINKING = re.compile(r"</?think>")


def written_turns(document: Document, student: Tokenizer) -> tuple[list[Message], bool]:
    """Return the turns that the student's template writes of a conversation, and if they are whole.

    Whole turns hold what a template writes in front of an answer for the model (`OPENS`) in their texts.
    A turn that holds special tokens is cut there (`CONTINUES`): those that the template writes, and markup
    (`special_pattern`). Any other that the row spells is text.

    Raises:
        ValueError: what the template does not write (the reason is short).
    """
    said = document.messages or ()
    turns = by_role(said, student.chat.turns, student.chat.joins_system)
    is_whole = False
    extra = bool(document.tools) or any([message.calls or message.reasoning for message in said])
    texts = (*document.says, document.tools or "") if extra else [message.content for message in said]
    pattern, inside = special_pattern(student)
    spelled: set[str] = set()
    if pattern is not None:
        spelled.update(*map(pattern.findall, texts))
        spelled -= inside
    if extra and spelled:
        raise ValueError("the string of a special token in a conversation with tools or reasoning")
    if extra or (has_own_template(student) and not spelled and any(map(_may_change, said))):
        turns, is_whole = _rendered(document, turns, student), True
    elif student.chat.trims_content:
        turns = [_trimmed(turn) for turn in turns]
    if pattern is None or not any([pattern.search(turn.content) for turn in turns]):
        return turns, is_whole
    return [part for turn in turns for part in _cut(turn, pattern, spelled)], is_whole


def _trimmed(turn: Message) -> Message:
    text = turn.content.strip()
    return turn if len(text) == len(turn.content) else replace(turn, content=text)


def _cut(turn: Message, pattern: re.Pattern[str], spelled: set[str]) -> list[Message]:
    """Cut a turn at the special tokens in it."""
    if spelled.issuperset(pattern.findall(turn.content)):
        return [turn]
    pieces = pattern.split(turn.content)
    parts = [replace(turn, content=pieces[0], trained=turn.is_trained)]
    for string, text in zip(pieces[1::2], pieces[2::2], strict=True):
        before = parts[-1]
        if string in spelled:
            parts[-1] = replace(before, content=before.content + string + text)
        elif not before.content:  # the token follows what stands in front
            parts[-1] = replace(before, role=before.role + CONTINUES + string, content=text)
        else:
            parts.append(replace(before, role=CONTINUES + string, content=text))
    return parts


def _rendered(document: Document, turns: list[Message], student: Tokenizer) -> list[Message]:
    """Return the turns with the texts that the template writes in them."""
    _check_says(document, student)
    template, tokens = exported_template(student) or "", student.family.tokens
    tools = json.loads(document.tools) if document.tools else None
    entries = [_entry(message) for message in document.messages or ()]
    candidates = [turns]
    if tools and turns[0].role != "system":
        candidates.append([Message("system", ""), *turns])
    try:
        written = render(template, entries, names=token_names(tokens), tools=tools)
        for candidate in candidates:
            texts = _between(written, around_turns(tuple(turn.role for turn in candidate), student))
            if texts is not None:
                pairs = zip(candidate, texts, strict=True)
                return [Message(turn.role, text, turn.is_trained) for turn, text in pairs]
    except TemplateError as error:
        raise ValueError(f"the chat template does not write the conversation: {error}") from error
    for message in document.messages or ():
        if message.content.strip() not in written:
            raise ValueError(f"the chat template does not write what the {message.role} says")
    raise ValueError("the chat template does not write the conversation turn by turn")


def by_role(messages: Sequence[Message], roles: Collection[str], joins: str) -> list[Message]:
    """Give messages whose role the template lacks to the user.

    A system message goes in front of the user message that follows; what tools say is said by the user.
    """
    result: list[Message] = []
    system: list[str] = []
    for message in messages:
        if message.role in roles:
            if message.role == "user" and system:
                message = replace(message, content=joins.join([*system, message.content]))
                system = []
            result.append(message)
        elif message.role == "system":
            system.append(message.content)
        else:
            result.append(replace(message, role="user"))
    if system:
        result.append(Message("user", joins.join(system)))
    return result


def _may_change(message: Message) -> bool:
    """Whether a template may write a message in another way than word for word."""
    text = message.content
    if message.role == "tool" or not text or ("think>" in text and _THINKING.search(text)):
        return True
    return text[0].isspace() or text[-1].isspace()


def _entry(message: Message) -> dict[str, Any]:
    """Return a message as chat templates expect it."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        entry["tool_calls"] = json.loads(message.calls)
    if message.reasoning:
        entry |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.name:
        entry["name"] = message.name
    if message.call_id:
        entry["tool_call_id"] = message.call_id
    return entry


def _between(written: str, gaps: Sequence[str]) -> list[str] | None:
    """Return what stands between the gaps of a conversation; None where they do not stand there in order.

    Text that reads as a gap leaves open where a turn ends: that is None too.
    """
    first, *inner, last = gaps
    if not written.startswith(first) or not written.endswith(last):
        return None
    position, end = len(first), len(written) - len(last)
    texts = []
    for gap in inner:
        at = written.find(gap, position, end)
        if at < 0 or not gap:
            return None
        texts.append(written[position:at])
        position = at + len(gap)
    texts.append(written[position:end])
    for gap, text in zip(reversed(inner), reversed(texts), strict=False):  # from behind, all stand there too
        at = written.rfind(gap, len(first), end)
        if at + len(gap) != end - len(text):
            return None
        end = at
    return texts if position <= len(written) - len(last) else None


def _check_says(document: Document, student: Tokenizer) -> None:
    said = document.messages or ()
    wanted = {
        "tool calls": any(message.calls for message in said),
        "tools": bool(document.tools),
        "reasoning": any(message.reasoning for message in said),
    }
    able = abilities(student)
    for name, is_asked in wanted.items():
        if is_asked and name not in able:
            raise ValueError(f"the chat template does not write {name}")


@functools.lru_cache(maxsize=16)
def abilities(student: Tokenizer) -> frozenset[str]:
    """Return which of tool calls, tools and reasoning the template writes."""
    template = exported_template(student)
    function = {"name": "Marker1Word", "arguments": {"Marker2Word": "Marker3Word"}}
    call = {"type": "function", "function": function, "id": "call00001"}
    parameters = {"type": "object", "properties": {"Marker2Word": {"type": "string"}}}
    tool = {"name": "Marker1Word", "description": "Marker3Word", "parameters": parameters}
    question: dict[str, Any] = {"role": "user", "content": "Q"}
    answer: dict[str, Any] = {"role": "assistant", "content": "A"}
    thinking = {"reasoning_content": "Marker1Word", "thinking": "Marker1Word"}
    probes: dict[str, tuple[list[dict[str, Any]], list[Any] | None, range]] = {
        "tool calls": ([question, {**answer, "content": "", "tool_calls": [call]}], None, range(1, 4)),
        "tools": ([question, answer], [{"type": "function", "function": tool}], range(1, 4)),
        "reasoning": ([question, answer | thinking], None, range(1, 2)),
    }
    able = set()
    for name, (messages, tools, markers) in probes.items():
        try:
            written = render(template or "", messages, names=token_names(student.family.tokens), tools=tools)
        except TemplateError:
            continue
        if all(f"Marker{number}Word" in written for number in markers):
            able.add(name)
    return frozenset(able)
