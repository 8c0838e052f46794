"""One entry of a conversation, under the many names that data sets use, as a `Message`."""

from __future__ import annotations

import functools
import json
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

MAX_DEPTH = 100  # of tools and tool calls; templates that write them are recursive too

_EXAMPLES = {"example_user": "user", "example_assistant": "assistant"}  # OpenAI's names of shown examples
_KEEPS = ("loss_weight", "weight", "train", "trainable", "loss", "loss_mask")  # 1: the message is trained
_REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    trained: bool | None = None
    """Whether the loss looks at it; None: where the role is assistant."""
    reasoning: str | None = None
    """What an assistant thought before it answered, where the row keeps that apart."""
    calls: str | None = None
    """The tool calls of an assistant: a JSON list as chat templates expect it."""
    name: str | None = None
    call_id: str | None = None
    """Of a tool's answer: whose it is."""

    @property
    def is_trained(self) -> bool:
        """Whether the loss looks at this message."""
        return self.role == "assistant" if self.trained is None else self.trained

    @property
    def says(self) -> tuple[str, ...]:
        """All texts of the message."""
        if not (self.reasoning or self.calls):  # by far the most common message
            return (self.content,) if self.content else ()
        return tuple(text for text in (self.content, self.reasoning, self.calls) if text)


def read_message(entry: Any) -> Message:
    """Read one entry of `messages` or `conversations`. A null says the same as a missing key.

    Raises:
        ValueError: with a short reason that does not quote the text.
    """
    if type(entry) is not dict and not isinstance(entry, Mapping):  # the second costs
        raise ValueError("a message is not a mapping")
    if len(entry) == 2 and type(content := entry.get("content", entry.get("value"))) is str:
        role = entry.get("role", entry.get("from"))
        if type(role) is str and role in ROLES and role != "function_call":
            return Message(ROLES[role], content)  # by far the most common message
    entry = {key: value for key, value in entry.items() if value is not None}
    spoken = entry.get("role", entry.get("from"))
    if not isinstance(spoken, str) or spoken not in ROLES:
        raise ValueError(f"unknown role {str(spoken)[:20]!r}")
    if any(entry.get(key) for key in MEDIA):
        raise ValueError("a message with something else than text")
    role, name, trained = ROLES[spoken], entry.get("name"), _trained(entry)
    if role == "system" and name in _EXAMPLES:
        role, trained, name = _EXAMPLES[name], trained or False, None
    content, reasoning = _content(entry.get("content", entry.get("value")))
    reasoning = _reasoning(entry, reasoning)
    calls = _calls(entry)
    if spoken == "function_call" and not calls and (calls := _spoken_calls(content, name)):
        content = ""
    if (calls or reasoning) and role != "assistant":
        raise ValueError(f"{'tool calls' if calls else 'reasoning'} of a {role}")
    if content is None:
        if not calls:
            raise ValueError("a message without text")
        content = ""
    return Message(
        role, content, trained, reasoning, _json(calls) if calls else None, name, entry.get("tool_call_id")
    )


def read_tools(value: Any) -> str | None:
    """Return the tools that a row offers, a JSON list as chat templates expect it; None where it has none.

    Raises:
        ValueError: what is no list of tools.
    """
    tools = _from_json(value, "tools")
    if not tools:
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("tools is not a list of tools")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return _json(_present(wrapped, keeps_nulls=isinstance(value, str)))


def refuse_media(row: Mapping[str, Any]) -> None:
    """Refuse a conversation that looks at pictures or listens.

    Raises:
        ValueError: a column of those holds something.
    """
    if any(row.get(key) is not None and row[key] != [] and row[key] != "" for key in MEDIA):
        raise ValueError("a conversation with something else than text")


def _trained(entry: Mapping[str, Any]) -> bool | None:
    said = {_switch(entry[key]) for key in _KEEPS if key in entry}
    if "mask" in entry and _switch(entry["mask"]):
        said.add(False)  # a message that is masked; one that is not is as its role says
    if len(said) > 1:
        raise ValueError("a message's masks disagree")
    return said.pop() if said else None


def _switch(value: Any) -> bool:
    if not isinstance(value, bool | int | float):
        raise ValueError("a message's weight is not a number")
    if value not in (0, 1):
        raise ValueError("a message's weight is neither 0 nor 1")
    return bool(value)


def _content(content: Any) -> tuple[str | None, str | None]:
    """Return the text of a message, its parts of type `text` one after the other, and its thinking."""
    if content is None or isinstance(content, str):
        return content, None
    if not isinstance(content, Sequence):
        raise ValueError("a message without text")
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("thinking", "reasoning"):
            thoughts.append(_part(part, (kind, "text")))
        elif isinstance(part, str):
            texts.append(part)
        elif kind == "text":
            texts.append(_part(part, ("text", "value")))
        else:
            raise ValueError("a message with something else than text")
    return "".join(texts), "".join(thoughts) or None


def _part(part: Mapping[str, Any], keys: Sequence[str]) -> str:
    text = next((part[key] for key in keys if part.get(key) is not None), None)
    if not isinstance(text, str):
        raise ValueError("a message with something else than text")
    return text


def _reasoning(entry: Mapping[str, Any], said: str | None) -> str | None:
    """Return what a message thinks under any of the names; what its parts say is one of them."""
    found = [said] if said else []
    found += [entry[key] for key in _REASONING if entry.get(key) and entry[key] not in found]
    if not all(isinstance(text, str) for text in found):
        raise ValueError("a message's reasoning is not text")
    if len(found) > 1:
        raise ValueError("a message's reasonings disagree")
    return found[0] if found else None


def _calls(entry: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    found = []
    for field in ("tool_calls", "function_call"):  # the second is OpenAI's older form
        value = _from_json(entry.get(field), field)
        if isinstance(value, Mapping):
            value = [value] if _present(value) else None
        if not value:
            continue
        calls = _as_calls(value)
        if calls is None:
            raise ValueError(f"{field} is not a list of calls with a name")
        found.append(calls)
    if len(found) == 2 and [c["function"] for c in found[0]] != [c["function"] for c in found[1]]:
        raise ValueError("tool_calls and function_call disagree")
    return found[0] if found else None


def _spoken_calls(content: str | None, name: Any) -> list[dict[str, Any]] | None:
    """Return the calls in the text of a `function_call`: whole ones, or the arguments of `name`."""
    calls = _as_calls(content)
    if calls is None and isinstance(name, str) and isinstance(_or_text(content or ""), Mapping):
        calls = _as_calls({"name": name, "arguments": content})
    return calls


def _as_calls(value: Any) -> list[dict[str, Any]] | None:
    """Return calls as chat templates read them; None where the value says none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        return None
    calls = []
    for entry in entries:
        inner = entry.get("function") or entry if isinstance(entry, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return None
        arguments = inner.get("arguments")
        arguments = inner.get("parameters") if arguments is None else arguments
        # a null in JSON was written there; one in an object may be Arrow's
        if isinstance(arguments, str):
            arguments = _present(_or_text(arguments), keeps_nulls=True)
        else:
            arguments = _present(arguments)
        function = {"name": inner["name"], "arguments": {} if arguments is None else arguments}
        call = {"type": "function", "function": function}
        calls.append(call | ({"id": entry["id"]} if entry.get("id") else {}))
    return calls


def _or_text(arguments: str) -> Any:
    """Return JSON's object where the string holds one: templates write objects, and quote strings."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _from_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{field} is not JSON") from None


def _present(value: Any, depth: int = MAX_DEPTH, *, keeps_nulls: bool = False) -> Any:
    """Leave out nulls: Arrow gives every struct of a column the keys of all others."""
    if depth == 0:
        raise ValueError("tools or tool calls that are nested too deeply")
    inside = functools.partial(_present, depth=depth - 1, keeps_nulls=keeps_nulls)
    if isinstance(value, Mapping):
        return {str(key): inside(item) for key, item in value.items() if keeps_nulls or item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [inside(item) for item in value]
    return value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("tools that are not JSON") from None
