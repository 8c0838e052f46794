"""From what a YAML file or a flag says to the type that a field wants, strictly, and back."""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from tokenkit.config.schema import MAIN, options
from tokenkit.errors import ConfigError, nearest

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "yes": True, "no": False}


def coerce(hint: Any, value: Any, name: str) -> Any:
    """Return `value` as the type `hint` wants.

    Numbers and booleans may be written as text (environment variables are), lists become tuples, one value
    stands for a list of one, records become dataclasses.

    Raises:
        ConfigError: field, value and wanted type.
    """
    wanted = options(hint)
    if value is None or (value in ("null", "None", "none", "~") and str not in wanted):
        if type(None) in wanted:
            return None
        if value is None:
            raise _wrong(name, value, hint)
    errors = []
    for option in wanted:
        if option is type(None):
            continue
        try:
            return _coerce_one(option, value, name)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong(name, value, hint)


def _coerce_one(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, value, name)
    if origin is Literal:
        return _choice(hint, value, name)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, Mapping) and not dataclasses.is_dataclass(typing.get_args(hint)[0]):
            raise _wrong(name, value, hint)
        inner = typing.get_args(hint)[0]
        return tuple(coerce(inner, item, f"{name}[{index}]") for index, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(name, value, hint)
        inner = typing.get_args(hint)[1]
        return {str(key): coerce(inner, item, f"{name}.{key}") for key, item in value.items()}
    return _scalar(hint, value, name)


def _scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is bool:
        word = _WORDS.get(value.lower()) if isinstance(value, str) else value
        if isinstance(word, bool):
            return word
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and hint is float:
            return float(number)
        if number is not None and number == int(number):
            return int(number)
    raise _wrong(name, value, hint)


def _number(value: Any) -> int | float | None:
    """A finite number, also from its text; None where it is none."""
    if isinstance(value, str) and len(value) > 400:
        return None  # Python refuses to read more digits than 4,300, in words of its own
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        text = value.replace("_", "")
        value = int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and isinstance(value, int) and value.bit_length() > 1000:
        return None  # beyond every float
    return value if is_number and math.isfinite(value) else None


def _choice(hint: Any, value: Any, name: str) -> Any:
    valid = typing.get_args(hint)
    if value in valid:
        return value
    raise ConfigError(
        f"{name}: {value!r} is not valid{nearest(str(value), valid)}; expected one of {', '.join(valid)}"
    )


def _record(schema: type, value: Any, name: str) -> Any:
    if isinstance(value, schema):
        return value
    hints = typing.get_type_hints(schema)
    if isinstance(value, str) and (main := next((field for field in MAIN if field in hints), None)):
        value = {main: value}
    if not isinstance(value, Mapping):
        raise _wrong(name, value, schema)
    for key in value:
        if key not in hints:
            raise ConfigError(
                f"{name}: unknown field {key}{nearest(str(key), hints)}; its fields are {', '.join(hints)}"
            )
    fields = dataclasses.fields(schema)
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in value]
    if required:
        raise ConfigError(f"{name}: missing required field {', '.join(required)}")
    typed = {key: coerce(hints[key], item, f"{name}.{key}") for key, item in value.items()}
    try:
        return schema(**typed)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _wrong(name: str, value: Any, hint: Any) -> ConfigError:
    return ConfigError(f"{name}: expected {describe(hint)}, got {value!r}")


def describe(hint: Any) -> str:
    """A type in words: "an integer", "a list of text or null"."""
    words = [_describe_one(option) for option in options(hint)]
    return " or ".join(words)


def _describe_one(hint: Any) -> str:
    simple = {
        Any: "anything",
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if hint in simple:
        return simple[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list, each {_describe_one(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from text to {_describe_one(arguments[1]).removeprefix('a ')}"
    return f"a mapping with {', '.join(typing.get_type_hints(hint))}"


def plain(value: Any) -> Any:
    """A value as YAML can hold it: lists, mappings, scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
