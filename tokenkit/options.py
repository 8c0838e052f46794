"""What records of options are made of: the flag of a field, checks, and errors that name either.

Records of options stand beside what they configure and load no torch: doors read their fields, help texts and
checks before anything heavy is imported. In code a field has its own name (`temperature`), at a door the one
that users know (`baseline.kd_temp`): an error is written once, with `{temperature}` in it.
"""

from __future__ import annotations

import dataclasses
import math
import string
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

from tokenkit.errors import nearest

T = TypeVar("T")

ChunkKind = Literal["unconstrained", "space", "unbiased"]

MOST_STEPS = 2**26 - 1
"""Ranks compare their steps as float64 sums of squares, which are exact below."""

MOST_DOCUMENTS = 2**20
"""Of one step: they are read and tokenized together."""

MOST_TOKENS = 2**20
"""Of one document."""


class OptionError(ValueError):
    """An option cannot be what it is.

    Args:
        template: the words, with `{field}` where a field is named and `{}` where a value stands.
        values: what stands there.
    """

    def __init__(self, template: str, *values: object):
        super().__init__(template, *values)

    def __str__(self) -> str:
        return self.said({})

    def said(self, names: Mapping[str, str]) -> str:
        """Return the words with fields under other names."""
        template, *values = self.args
        return string.Formatter().vformat(template, values, _Names(names))


class _Names(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return key


def option(default: Any, flag: str | None, *, of_pair: bool = False) -> Any:
    """Return a field of a record of options.

    Args:
        default: its default.
        flag: its dotted name at a door; None: no door sets it.
        of_pair: it says what a trainer looks up of two tokenizers; who hands that over has no use for it.
    """
    return dataclasses.field(default=default, metadata={"flag": flag, "of_pair": of_pair})


def flat(group: Callable[[], T]) -> T:
    """Return a field that holds a group whose fields are named without it; `group` makes its default."""
    return dataclasses.field(default_factory=group, metadata={"flat": True})


def flag_of(field: dataclasses.Field[Any]) -> str | None:
    """Return the name of a field at a door; None: it has none."""
    flag: str | None = field.metadata.get("flag", field.name)
    return flag


class Checked:
    """A record some of whose fields are `Literal`; `check_choices` knows them.

    They are found where the class is made: an options record may be made inside `torch.compile`, which cannot
    follow the reading of annotations.
    """

    __choices__: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.__choices__ = _choices(cls)


def _choices(record: Any) -> dict[str, tuple[Any, ...]]:
    """The allowed values of fields that are `Literal`, or that or None."""
    found = {}
    for name, hint in typing.get_type_hints(record).items():
        is_union = typing.get_origin(hint) in (Union, types.UnionType)
        kinds = [x for x in (typing.get_args(hint) if is_union else (hint,)) if x is not type(None)]
        if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal:
            none = (None,) if is_union else ()
            found[name] = (*typing.get_args(kinds[0]), *none)
    return found


def check_choices(record: Checked) -> None:
    """Raise OptionError where a field holds none of the words that its type allows."""
    for name, valid in record.__choices__.items():
        value = getattr(record, name)
        if value not in valid:
            words = ", ".join(str(x) for x in valid)
            near = nearest(str(value), (str(x) for x in valid))
            raise OptionError(f"unknown {{{name}}} {{!r}}{{}}: expected one of {{}}", value, near, words)


def check_parts(name: str, value: str, valid: Iterable[str]) -> None:
    """Raise OptionError where a part of a value that is joined with `+` is unknown or stands twice."""
    parts, words = value.split("+"), tuple(valid)
    for part in parts:
        if part not in words:
            raise OptionError(
                f"{{{name}}}: {{!r}} is unknown{{}}; expected {{}}, joined with +",
                part,
                nearest(part, words),
                ", ".join(words),
            )
    if len(set(parts)) < len(parts):
        raise OptionError(f"{{{name}}}: {{!r}} names a part twice", value)


def check_positive(record: Any, *names: str) -> None:
    """Raise OptionError where a number is not positive and finite; None passes."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"{{{name}}} must be positive, got {{}}", value)


def check_share(record: Any, *names: str) -> None:
    """Raise OptionError where a number is outside [0, 1]; None passes."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not 0 <= value <= 1:
            raise OptionError(f"{{{name}}} must lie in [0, 1], got {{}}", value)


def check_at_least(record: Any, smallest: float, *names: str, largest: float = math.inf) -> None:
    """Raise OptionError where a number is below `smallest`, above `largest` or not finite; None passes."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not smallest <= value < math.inf:
            raise OptionError(f"{{{name}}} must be at least {smallest}, got {{}}", value)
        if value is not None and value > largest:
            raise OptionError(f"{{{name}}} must be at most {largest}, got {{}}", value)
