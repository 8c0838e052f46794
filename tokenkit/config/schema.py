"""How a dataclass becomes a list of named fields, and a list of values a dataclass again.

A configuration is a tree of frozen dataclasses. Its names are flat where a group is marked `flat` (`steps`,
though code reads `config.schedule.steps`), dotted where it is not (`optimizer.learning_rate`), and those of
`tokenkit.options.option` where a field has one of its own. Several fields may have one name: they are one
setting.
"""

import ast
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, TypeVar, Union

from tokenkit.errors import ConfigError
from tokenkit.losses.shared_options import HEADINGS
from tokenkit.options import OptionError, flag_of

T = TypeVar("T")


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
    found: dict[str, Leaf] = {}
    hints, docs = typing.get_type_hints(schema), field_docs(schema)
    for field in dataclasses.fields(schema):
        group = as_group(hints[field.name])
        if group is not None:
            for leaf in leaves(group, inner_prefix(field, prefix)):
                found.setdefault(leaf.name, leaf)
            continue
        name = _name_of(field, prefix)
        if name is None:
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        told = field.metadata.get("help") or docs.get(field.name, "")
        found.setdefault(name, Leaf(name, hints[field.name], default, told, schema))
    return tuple(found.values())


def _name_of(field: "dataclasses.Field[Any]", prefix: str) -> str | None:
    flag = flag_of(field)
    return None if flag is None else prefix + flag


def heading(leaf: Leaf) -> str:
    """What is said of the group that a setting's name puts it in."""
    return HEADINGS.get(leaf.name.rpartition(".")[0]) or (leaf.group.__doc__ or "").strip()


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
def group_prefixes(schema: type) -> tuple[str, ...]:
    """The dotted groups of a schema, `student.` and so on."""
    parts = [leaf.name.split(".")[:-1] for leaf in leaves(schema)]
    return tuple({".".join(some[: n + 1]) + ".": None for some in parts for n in range(len(some))})


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
        pairs = [name.rpartition(".") for name in missing]
        flags = [group if last in MAIN else group + dot + last for group, dot, last in pairs]
        raise ConfigError(
            f"missing required field {', '.join(missing)}: set it in a file given with --config, "
            f"or pass {' '.join('--' + flag.replace('_', '-') + ' VALUE' for flag in flags)}"
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
            name = _name_of(field, prefix)
            values |= {} if name is None else {name: value}
        elif value is not None:
            values |= flatten(value, inner_prefix(field, prefix))
    return values


def field_docs(schema: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of what it inherits from, on one line each."""
    docs: dict[str, str] = {}
    for kind in reversed(schema.__mro__[:-1]):
        for node in _module_tree(sys.modules[kind.__module__]).body:
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                docs |= _docs_of(node)
    return docs


def _needed(schema: type, values: Mapping[str, Any], prefix: str = "") -> list[Leaf]:
    """The required settings, those of an optional group only where the group is present."""
    found: list[Leaf] = []
    hints = typing.get_type_hints(schema)
    own = {leaf.name: leaf for leaf in leaves(schema, prefix)}
    for field in dataclasses.fields(schema):
        group = as_group(hints[field.name])
        if group is None:
            leaf = own.get(_name_of(field, prefix) or "")
            found += [leaf] if leaf is not None and leaf.is_required else []
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
            name = _name_of(field, prefix)
            if name is not None and name in values:
                arguments[field.name] = values[name]
            continue
        inner = inner_prefix(field, prefix)
        if _is_absent(hints[field.name], inner, values):
            arguments[field.name] = None
        else:
            arguments[field.name] = _build(group, values, inner)
    try:
        return schema(**arguments)
    except OptionError as error:
        names = {field.name: _name_of(field, prefix) or field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
        raise ConfigError(error.said(names)) from error


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
