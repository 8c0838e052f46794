"""A conversation as the turns that are written: what the student's template makes of a row.

The student is what a run exports, so its template decides: a message of `messages` here has a role that the
template has a turn for, and its text is all that the template writes between header and end of the turn.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenkit.tokenization.documents import Document, Message
from tokenkit.tokenization.rendering import TemplateError, render
from tokenkit.tokenization.template import marked, token_names

if TYPE_CHECKING:
    from tokenkit.tokenization.byteify import Tokenizer

CONTINUES = "+"
"""A turn goes on behind the special token whose string follows."""
_THINKING = re.compile(r"</?think>")


def written_turns(document: Document, student: Tokenizer) -> list[Message]:
    """Return the turns that the student's template writes of a conversation.

    A turn that holds special tokens is cut there: its later parts have the role `CONTINUES` and the token's
    string. Such a token is one that the template writes, or one that transformers finds in text as well
    (`_special`); any other that the row spells is text.

    Raises:
        ValueError: what the template does not write (the reason is short).
    """
    said = document.messages or ()
    turns = by_role(said, frozenset(student.chat.turns), student.chat.joins_system)
    spelled = {string for text in _texts(document) for string in _special_in(text, student)}
    extra = bool(document.tools) or any(message.calls or message.reasoning for message in said)
    if extra and spelled:
        raise ValueError("the string of a special token in a conversation with tools or reasoning")
    if extra or (student.has_own_template and not spelled and any(map(_may_change, said))):
        turns = _rendered(document, turns, student)
    elif student.chat.trims_content:
        turns = [replace(turn, content=turn.content.strip()) for turn in turns]
    return [part for turn in turns for part in _cut(turn, student, spelled)]


def _special_in(text: str, tokenizer: Tokenizer, *, with_inside: bool = False) -> list[str]:
    """Return the strings of special tokens that text spells, leaving out markup."""
    pattern, inside = _special(tokenizer)
    found = pattern.findall(text) if pattern else []
    return found if with_inside else [string for string in found if string not in inside]


@functools.lru_cache(maxsize=16)
def _special(tokenizer: Tokenizer) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """Return what finds special tokens, and those that are markup inside messages.

    Markup, such as `<think>`, is no special token for transformers: it reads it in messages as training does.
    """
    strings = sorted(tokenizer.control, key=len, reverse=True)
    added = tokenizer.document.get("added_tokens") or []
    ordinary = {token["content"] for token in added if not token.get("special")}
    pattern = re.compile("|".join(map(re.escape, strings))) if strings else None
    return pattern, frozenset(ordinary & tokenizer.control.keys())


def _texts(document: Document) -> tuple[str, ...]:
    return (*document.says, document.tools or "")


def _cut(turn: Message, student: Tokenizer, spelled: set[str]) -> list[Message]:
    """Cut a turn at the special tokens in it."""
    if not any(string not in spelled for string in _special_in(turn.content, student, with_inside=True)):
        return [turn]
    strings = sorted(student.control.keys() - spelled, key=len, reverse=True)
    first, *others = re.split("(" + "|".join(map(re.escape, strings)) + ")", turn.content)
    parts = [Message(turn.role, first, turn.is_trained)]
    for string, text in zip(others[::2], others[1::2], strict=True):
        parts.append(Message(CONTINUES + string, text, turn.is_trained))
    return parts


def _rendered(document: Document, turns: list[Message], student: Tokenizer) -> list[Message]:
    """Return the turns with the texts that the template writes in them."""
    _check_says(document, student)
    template, tokens = student.exported_template or "", student.family.tokens
    tools = json.loads(document.tools) if document.tools else None
    entries = [_entry(message) for message in document.messages or ()]
    candidates = [turns]
    if tools and turns[0].role != "system":
        candidates.append([Message("system", ""), *turns])
    try:
        written = render(template, entries, names=token_names(tokens), tools=tools)
        for candidate in candidates:
            texts = _between(written, marked(template, tokens, [turn.role for turn in candidate]))
            if texts is not None:
                pairs = zip(candidate, texts, strict=True)
                return [Message(turn.role, text, turn.is_trained) for turn, text in pairs]
    except TemplateError as error:
        raise ValueError(f"the chat template does not write the conversation: {error}") from error
    raise ValueError("the chat template does not write the conversation turn by turn")


def by_role(messages: Sequence[Message], roles: frozenset[str], joins: str) -> list[Message]:
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
    if message.role == "tool" or not text or _THINKING.search(text):
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
    """Return what stands between the gaps of a conversation; None where they do not stand there in order."""
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
    return [*texts, written[position:end]] if position <= end else None


def _check_says(document: Document, student: Tokenizer) -> None:
    said = document.messages or ()
    wanted = {
        "tool calls": any(message.calls for message in said),
        "tools": bool(document.tools),
        "reasoning": any(message.reasoning for message in said),
    }
    able = _abilities(student)
    for name, is_asked in wanted.items():
        if is_asked and name not in able:
            raise ValueError(f"the chat template does not write {name}")


@functools.lru_cache(maxsize=16)
def _abilities(student: Tokenizer) -> frozenset[str]:
    """Return which of tool calls, tools and reasoning the template writes."""
    template = student.exported_template
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
