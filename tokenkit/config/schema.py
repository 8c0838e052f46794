"""How a dataclass becomes a list of named fields, and a list of values a dataclass again.

A configuration is a tree of frozen dataclasses of at most twelve fields. Its names are flat where a
group is marked `flat` (`steps`, though code reads `config.schedule.steps`) and dotted where it is not
(`optimizer.learning_rate`).
"""

import ast
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, TypeVar, Union

from tokenkit.config.errors import ConfigError

T = TypeVar("T")

FLAT = {"flat": True}


def flat(group: Callable[[], T]) -> T:
    """A group whose fields are named without it; `group` makes its default."""
    return dataclasses.field(default_factory=group, metadata=FLAT)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One setting of a configuration."""

    name: str
    """Dotted, as in YAML: `optimizer.learning_rate`."""
    type: Any
    """Its annotation, resolved."""
    default: Any
    """`dataclasses.MISSING` where there is none."""
    help: str
    """The docstring below the field."""
    group: type
    """The dataclass that holds it."""

    @property
    def is_required(self) -> bool:
        """No default exists."""
        return self.default is MISSING


@cache
def leaves(schema: type, prefix: str = "") -> tuple[Leaf, ...]:
    """Every setting below `schema`, in the order of the source."""
    found: list[Leaf] = []
    hints, docs = typing.get_type_hints(schema), field_docs(schema)
    for field in dataclasses.fields(schema):
        group = as_group(hints[field.name])
        if group is not None:
            found += leaves(group, inner_prefix(field, prefix))
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        help_text = docs.get(field.name, "")
        found.append(Leaf(prefix + field.name, hints[field.name], default, help_text, schema))
    return tuple(found)


def as_group(hint: Any) -> type | None:
    """The dataclass of a nested group, `X` or `X | None`; None for a setting."""
    for option in options(hint):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else, itself."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def inner_prefix(field: "dataclasses.Field[Any]", prefix: str) -> str:
    """What stands before the names inside the group `field`."""
    return prefix if field.metadata.get("flat") else f"{prefix}{field.name}."


@cache
def group_prefixes(schema: type, prefix: str = "") -> tuple[str, ...]:
    """The dotted groups of a schema, `student.` and so on."""
    found: list[str] = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        group = as_group(hints[field.name])
        if group is None:
            continue
        inner = inner_prefix(field, prefix)
        found += [inner] if inner != prefix else []
        found += group_prefixes(group, inner)
    return tuple(found)


MAIN = ("pretrained_model_name_or_path", "dataset_name")
"""What is meant where a group is given as text: `student: PATH`, `--data FILE`."""


def main_field(schema: type, group: str) -> str | None:
    """The field that a group given as text sets; None: `group` is none, or has no such field."""
    names = {leaf.name for leaf in leaves(schema)}
    return next((f"{group}.{last}" for last in MAIN if f"{group}.{last}" in names), None)


def build(schema: type[T], values: Mapping[str, Any]) -> T:
    """Make a configuration of values by dotted name; what is absent takes its default.

    Raises:
        ConfigError: a field without default is missing, or a dataclass refuses its values.
    """
    missing = [leaf.name for leaf in _needed(schema, values) if leaf.name not in values]
    if missing:
        raise ConfigError(
            f"missing required field {', '.join(missing)}: set it in a file given with --config, "
            f"or pass {' '.join('--' + name.replace('_', '-') + ' VALUE' for name in missing)}"
        )
    try:
        return _build(schema, values, "")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The inverse of `build`: values by dotted name. A group that is None is left out."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if as_group(hints[field.name]) is None:
            values[prefix + field.name] = value
        elif value is not None:
            values |= flatten(value, inner_prefix(field, prefix))
    return values


def field_docs(schema: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, on one line each."""
    module = sys.modules[schema.__module__]
    for node in _module_tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == schema.__name__:
            return dict(_docs_of(node))
    return {}


def _needed(schema: type, values: Mapping[str, Any], prefix: str = "") -> list[Leaf]:
    """The required settings, those of an optional group only where the group is present."""
    found: list[Leaf] = []
    hints = typing.get_type_hints(schema)
    own = {leaf.name: leaf for leaf in leaves(schema, prefix)}
    for field in dataclasses.fields(schema):
        group = as_group(hints[field.name])
        if group is None:
            leaf = own[prefix + field.name]
            found += [leaf] if leaf.is_required else []
            continue
        inner = inner_prefix(field, prefix)
        if not _is_absent(hints[field.name], inner, values):
            found += _needed(group, values, inner)
    return found


def _build(schema: type[T], values: Mapping[str, Any], prefix: str) -> T:
    arguments: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        group = as_group(hints[field.name])
        if group is None:
            if prefix + field.name in values:
                arguments[field.name] = values[prefix + field.name]
            continue
        inner = inner_prefix(field, prefix)
        if _is_absent(hints[field.name], inner, values):
            arguments[field.name] = None
        else:
            arguments[field.name] = _build(group, values, inner)
    return schema(**arguments)


def _is_absent(hint: Any, inner: str, values: Mapping[str, Any]) -> bool:
    """An optional group of which nothing is set is None."""
    return type(None) in options(hint) and not any(
        name.startswith(inner) and value is not None for name, value in values.items()
    )


@cache
def _module_tree(module: types.ModuleType) -> ast.Module:
    try:
        return ast.parse(inspect.getsource(module))
    except OSError:  # installed without sources: help texts are empty, nothing else changes
        return ast.Module(body=[], type_ignores=[])


def _docs_of(node: ast.ClassDef) -> list[tuple[str, str]]:
    pairs = []
    for statement, after in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            pairs.append((statement.target.id, " ".join(str(after.value.value).split())))
    return pairs
