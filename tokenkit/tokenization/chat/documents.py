"""What a row of a data set says: plain text, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenkit.tokenization.chat.messages import MEDIA, ROLES, Message, read_message, read_tools, refuse_media

__all__ = ["KNOWN_FIELDS", "ROLES", "Document", "Message", "document_from_row"]

KNOWN_FIELDS = ("text", "messages", "conversations", "prompt", "instruction", "ideal")
"""The fields of which a row that is read by its own shape has one."""

_SYSTEM = ("system", "system_prompt", "system_message")
_BESIDE = frozenset((*_SYSTEM, *MEDIA, "history", "tools", "functions", "chat_template_kwargs"))
"""What a row may say of a conversation beside its messages."""


@dataclass(frozen=True)
class Document:
    """Plain text, or messages."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    is_pair: bool = False
    """The messages are a prompt and its completion: the direct modes write them as one plain text."""
    tools: str | None = None
    """The tools that a conversation may call: a JSON list as chat templates expect it."""

    def __post_init__(self) -> None:
        """Check that it is one of both, and says something.

        Raises:
            ValueError: both or neither, or nothing but whitespace.
        """
        if (self.text is None) == (self.messages is None):
            raise ValueError("a document has either text or messages")
        for message in self.messages or (self.text or "",):
            for content in (message,) if isinstance(message, str) else message.says:
                if content and not content.isspace():
                    return
        raise ValueError("empty document")

    @property
    def says(self) -> tuple[str, ...]:
        """All texts of the document, but the definitions of its tools."""
        if self.messages is None:
            return (self.text or "",)
        return tuple([text for message in self.messages for text in message.says])


def document_from_row(row: Mapping[str, Any]) -> Document:
    """Read a row by the fields that it has. A null says the same as a missing field.

        messages | conversations [, system, tools]        a list of role and content (or `from` and `value`)
        prompt, completion | response [, system, history] the prompt is masked
        instruction, input, output [, system, history]    the same, Alpaca's names
        input, ideal                                      the same, of OpenAI's evaluations
        text                                              plain text

    Raises:
        ValueError: with a short reason that does not quote the row.
    """
    if type(row) is dict and len(row) == 1 and type(row.get("text")) is str:
        return Document(text=row["text"])  # by far the most common row
    if type(row) is not dict and not isinstance(row, Mapping):
        raise ValueError(f"a row is a mapping of fields: got {type(row).__name__}")
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return _conversation(row, _messages(row[name]))
    if row.get("prompt") is not None:
        answer = "completion" if row.get("completion") is not None else "response"
        return _prompt_and_answer(row, "prompt", row.get(answer), answer)
    if row.get("instruction") is not None:
        question = "\n".join(filter(None, (_text(row, "instruction"), _text(row, "input", ""))))
        return _conversation(row, (Message("user", question), Message("assistant", _text(row, "output"))))
    if row.get("ideal") is not None:
        ideal = row["ideal"]
        is_choice = isinstance(ideal, Sequence) and not isinstance(ideal, str) and len(ideal) > 0
        document = _prompt_and_answer(row, "input", ideal[0] if is_choice else ideal, "ideal")
        return replace(document, is_pair=False)
    if "text" in row:
        return Document(text=_text(row, "text"))
    raise ValueError("no field text, messages, prompt or instruction")


def _conversation(row: Mapping[str, Any], messages: tuple[Message, ...]) -> Document:
    """Return a conversation with what the row says of it beside the messages."""
    if _BESIDE.isdisjoint(row):
        return Document(messages=messages)
    _refuse_unread(row)
    messages = (*_history(row.get("history")), *messages)
    said = [text for text in (_text(row, name, "") for name in _SYSTEM) if text]
    if system := "\n\n".join(dict.fromkeys(said)):
        first = messages[0]
        if first.role != "system":
            messages = (Message("system", system), *messages)
        elif first.content != system:
            messages = (Message("system", f"{system}\n\n{first.content}", first.trained), *messages[1:])
    tools = read_tools(row.get("tools") if row.get("tools") is not None else row.get("functions"))
    return Document(messages=messages, tools=tools)


def _refuse_unread(row: Mapping[str, Any]) -> None:
    """Refuse what changes a conversation and cannot be written."""
    refuse_media(row)
    if row.get("chat_template_kwargs"):
        raise ValueError("chat_template_kwargs: the template is written without options")


def _history(pairs: Any) -> tuple[Message, ...]:
    """Read earlier questions and answers: a list of pairs, or of messages."""
    if not pairs:
        return ()
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise ValueError("history is not a list of pairs")
    if all(isinstance(entry, Mapping) for entry in pairs):
        return _messages(pairs)
    said = []
    for pair in pairs:
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise ValueError("history is not a list of pairs")
        said += [Message("user", pair[0]), Message("assistant", pair[1])]
    return tuple(said)


def _prompt_and_answer(row: Mapping[str, Any], prompt: str, answer: Any, name: str) -> Document:
    """Return a prompt and its answer: one text in the direct modes, where neither is a list of messages."""
    asked = row.get(prompt)
    if any(isinstance(said, Sequence | Mapping) and not isinstance(said, str) for said in (asked, answer)):
        turns = [*_as_turns(asked, "user", prompt), *_as_turns(answer, "assistant", name)]
        return _conversation(row, _messages(turns))
    messages = (Message("user", _text(row, prompt)), Message("assistant", _text({name: answer}, name)))
    if any(row.get(field) for field in (*_SYSTEM, "history", "tools", "functions")):
        return _conversation(row, messages)
    _refuse_unread(row)
    return Document(messages=messages, is_pair=True)


def _as_turns(said: Any, role: str, field: str) -> Sequence[Any]:
    """Return one side of a prompt and its answer as entries of `messages`."""
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    if isinstance(said, Mapping):
        return [said]
    if not isinstance(said, Sequence) or not said:
        raise ValueError(f"field {field!r} is neither text nor messages")
    return said


def _messages(entries: Any) -> tuple[Message, ...]:
    is_list = type(entries) is list or (isinstance(entries, Sequence) and not isinstance(entries, str))
    if not is_list or not entries:
        raise ValueError("messages is not a list of messages")
    return tuple([read_message(entry) for entry in entries])


def _text(row: Mapping[str, Any], field: str, missing: str | None = None) -> str:
    value = row.get(field, missing)
    if value is None:
        value = missing
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is not text")
    return value
