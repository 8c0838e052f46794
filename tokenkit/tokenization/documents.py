"""What a row of a data set says: plain text, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The roles that data sets use, and what they are here."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    trained: bool | None = None
    """Whether the loss looks at it; None: where the role is assistant."""

    @property
    def is_trained(self) -> bool:
        """Whether the loss looks at this message."""
        return self.role == "assistant" if self.trained is None else self.trained


@dataclass(frozen=True)
class Document:
    """Plain text, or messages."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    is_pair: bool = False
    """The messages are a prompt and its completion: the direct modes write them as one plain text."""

    def __post_init__(self) -> None:
        """Check that it is one of both, and says something.

        Raises:
            ValueError: both or neither, or nothing but whitespace.
        """
        if (self.text is None) == (self.messages is None):
            raise ValueError("a document has either text or messages")
        said = (self.text or "",) if self.messages is None else [m.content for m in self.messages]
        for content in said:
            if content and not content.isspace():
                return
        raise ValueError("empty document")


def document_from_row(row: Mapping[str, Any]) -> Document:
    """Read a row by the fields that it has.

        messages | conversations                          a list of role and content (or `from` and `value`)
        prompt, completion | response                     the prompt is masked
        instruction, input, output [, system]             the same, Alpaca's names
        text                                              plain text

    Raises:
        ValueError: with a short reason that does not quote the row.
    """
    if type(row) is dict and len(row) == 1 and type(row.get("text")) is str:
        return Document(text=row["text"])  # by far the most common row
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is a mapping of fields: got {type(row).__name__}")
    for field in ("messages", "conversations"):
        if row.get(field) is not None:
            return Document(messages=_messages(row[field]))
    if row.get("prompt") is not None:
        answer = "completion" if row.get("completion") is not None else "response"
        return _prompt_and_answer(row, "prompt", answer)
    if row.get("instruction") is not None:
        messages = [
            Message("user", "\n".join(filter(None, (_text(row, "instruction"), _text(row, "input", "")))))
        ]
        if row.get("system"):
            messages.insert(0, Message("system", _text(row, "system")))
        return Document(messages=(*messages, Message("assistant", _text(row, "output"))))
    if "text" in row:
        return Document(text=_text(row, "text"))
    raise ValueError("no field text, messages, prompt or instruction")


def _prompt_and_answer(row: Mapping[str, Any], prompt: str, answer: str) -> Document:
    if isinstance(row[prompt], Sequence) and not isinstance(row[prompt], str):
        return Document(messages=_messages([*row[prompt], *_as_turns(row.get(answer))]))
    return Document(
        messages=(Message("user", _text(row, prompt)), Message("assistant", _text(row, answer))), is_pair=True
    )


def _as_turns(answer: Any) -> Sequence[Any]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer or []


def _messages(entries: Any) -> tuple[Message, ...]:
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ValueError("messages is not a list of messages")
    return tuple(_message(entry) for entry in entries)


def _message(entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise ValueError("a message is not a mapping")
    role = entry.get("role", entry.get("from"))
    if role not in ROLES:
        raise ValueError(f"unknown role {str(role)[:20]!r}")
    weight = entry.get("loss_weight", entry.get("weight", entry.get("train")))
    if weight is not None and not isinstance(weight, bool | int | float):
        raise ValueError("a message's weight is not a number")
    content = _content(entry.get("content", entry.get("value")))
    return Message(ROLES[role], content, None if weight is None else weight > 0)


def _content(content: Any) -> str:
    """Return the text of a message, whose parts of type `text` are put one after the other."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(_part(part) for part in content)
    raise ValueError("a message without text")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    raise ValueError("a message with something else than text")


def _text(row: Mapping[str, Any], field: str, missing: str | None = None) -> str:
    value = row.get(field, missing)
    if value is None:
        value = missing
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is not text")
    return value
