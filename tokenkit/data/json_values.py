"""JSON values of one text, those that cannot be read among them, with the place of each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TOO_LONG = "a number of too many digits"  # Python reads 4,300 at most
_SPACE = re.compile(r"[ \t\r\n]*")
_BEFORE_ITEM = re.compile(r"[ \t\r\n,]*")
_OBJECT_LINE = re.compile(r"^\{", re.MULTILINE)
_PLAIN = json.JSONDecoder()
_ANY_NUMBER = json.JSONDecoder(parse_int=str)


@dataclass(frozen=True, slots=True)
class Value:
    """What stands at one place."""

    value: Any
    place: str
    """`line 3`, `item 3`."""
    reason: str | None = None
    """Why it could not be read; None: it was."""


def read_value(text: str, place: str) -> Value:
    """Read a text that holds one value, and nothing else."""
    try:
        return Value(json.loads(text), place)
    except (json.JSONDecodeError, RecursionError):
        return Value(None, place, "not JSON")
    except ValueError:
        return Value(None, place, TOO_LONG)


def begins_values(head: str) -> bool:
    """Whether the beginning of a text holds an object, or the first item of a list."""
    start = _after(_SPACE, head, 0)
    if head.startswith("[", start):
        start = _after(_SPACE, head, start + 1)
    elif not head.startswith("{", start):
        return False
    try:
        _ANY_NUMBER.raw_decode(head, start)
    except (json.JSONDecodeError, RecursionError):
        return head.startswith("]", start)
    return True


def values_of(text: str) -> Iterator[Value] | None:
    """Return the items of a list, of the list under `data` of an object, or objects one behind the other.

    Behind an object that cannot be read, the next line that begins with a brace goes on.

    Returns:
        None where the text is no list and begins with no whole object.
    """
    start = _after(_SPACE, text, 0)
    found = None
    for decoder in (_PLAIN, _ANY_NUMBER):
        try:
            found = decoder.raw_decode(text, start)
            break
        except (json.JSONDecodeError, RecursionError):
            return None
        except ValueError:  # of a number: the other decoder does not mind
            continue
    assert found is not None
    value, end = found
    is_whole = _after(_SPACE, text, end) == len(text)
    items = value.get("data") if isinstance(value, dict) else value
    if isinstance(items, list) and is_whole:
        if decoder is _PLAIN:
            return (Value(item, f"item {number}") for number, item in enumerate(items, 1))
        return _items(text, items)
    return _objects(text, start) if isinstance(value, dict) else None


def _objects(text: str, position: int) -> Iterator[Value]:
    line, counted = 1, 0
    while (position := _after(_SPACE, text, position)) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _PLAIN.raw_decode(text, position)
            yield Value(value, f"line {line}")
        except (json.JSONDecodeError, RecursionError):
            yield Value(None, f"line {line}", "not JSON")
            following = _OBJECT_LINE.search(text, position + 1)
            if following is None:
                return
            position = following.start()
        except ValueError:
            yield Value(None, f"line {line}", TOO_LONG)
            _, position = _ANY_NUMBER.raw_decode(text, position)


def _items(text: str, items: list[Any]) -> Iterator[Value]:
    """Read a list, some of whose numbers Python refuses, item by item."""
    position = 1 + next(at.start() for at in re.finditer(r"\[", text) if _begins(items, text, at.start()))
    for number in range(1, len(items) + 1):
        position = _after(_BEFORE_ITEM, text, position)
        try:
            value, position = _PLAIN.raw_decode(text, position)
            yield Value(value, f"item {number}")
        except ValueError:
            yield Value(None, f"item {number}", TOO_LONG)
            _, position = _ANY_NUMBER.raw_decode(text, position)


def _begins(items: list[Any], text: str, position: int) -> bool:
    try:
        return bool(_ANY_NUMBER.raw_decode(text, position)[0] == items)
    except (json.JSONDecodeError, RecursionError):
        return False


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    assert match is not None
    return match.end()
