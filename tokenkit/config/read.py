"""Files, then flags, then interpolation, then types: from what a user wrote to a configuration."""

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from tokenkit.config.effects import without_effect
from tokenkit.config.schema import Leaf, build, flatten, group_prefixes, leaves, main_field, options
from tokenkit.config.shipped import Written, read_configs
from tokenkit.config.translate import translate
from tokenkit.config.unknown import unknown_field
from tokenkit.config.values import coerce, plain
from tokenkit.config.yaml_files import dump_yaml
from tokenkit.errors import ConfigError
from tokenkit.run.redaction import has_secret, is_secret_name

T = TypeVar("T")

_VARIABLE = re.compile(r"\$\{\s*([A-Za-z_]\w*)\s*\}")
_OPEN = r"(?<!\\)(?:\\\\)*\$\{\s*"  # a backslash in front makes it ordinary text
_RESOLVER = re.compile(_OPEN + r"([\w.]+)\s*:")
_ENVIRONMENT = re.compile(_OPEN + r"oc\.env\s*:\s*([^,}\s]+)")


class Changes(dict[str, Any]):
    """Entries of a mapping, by dotted name, that change what files say instead of taking its place."""


def read_config(
    schema: type[T],
    files: Sequence[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    aliases: Mapping[str, str] | None = None,
    folders: Sequence[Path] = (),
    say: Callable[[str], None] | None = None,
) -> T:
    """Read a configuration.

    Args:
        schema: a frozen dataclass, see `tokenkit.config.schema`.
        files: YAML files, by path or by the name of one that comes with the package; a later one wins, field
            by field.
        overrides: values by dotted name, such as flags; they win over files.
        aliases: other names of fields and groups.
        folders: where else files are looked for by name.
        say: takes one line for each alias that was used, and one about options that nothing will read; None:
            standard error.

    Raises:
        ConfigError: one line that names the field, where it was set, and what to do.
    """
    say = say or _warn
    of_files = [(source, _own_part(schema, content)) for source, content in read_configs(files, folders)]
    written = [*of_files, ("", dict(overrides or {}))]
    given, origin, variables = _gather(schema, written, aliases or {}, say)
    for note in translate(schema, given, {name for name, source in origin.items() if source}):
        say(note)
    values = _interpolate(schema, given, variables)
    types = {leaf.name: leaf.type for leaf in leaves(schema)}  # type: ignore[arg-type]
    typed = {}
    for name, value in values.items():
        source = origin.get(name, "")
        try:
            typed[name] = coerce(types[name], value, name)
        except ConfigError as error:
            raise ConfigError(f"{error} ({source})" if source else str(error)) from error
        _refuse_secrets(name, typed[name], source)
    config = build(schema, typed)
    if (idle := without_effect(config, typed)) is not None:
        say(idle)
    return config


OF_TRAINING = ("student", "teacher", "target_tokenizer_name")


def _own_part(schema: type, content: dict[str, Any]) -> dict[str, Any]:
    """Of a file with a training's models and the members of an ensemble, those that `schema` asks for."""
    if "models" not in content or not any(name in content for name in OF_TRAINING):
        return content
    is_ensemble = any(leaf.name == "models" for leaf in leaves(schema))
    left_out = OF_TRAINING if is_ensemble else ("models",)
    return {name: value for name, value in content.items() if name not in left_out}


def _gather(
    schema: type, written: Written, aliases: Mapping[str, str], say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Values by canonical name, where each was set, and the variables that files refer to."""
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    variables: dict[str, Any] = {}
    said: dict[str, str] = {}
    referenced = {
        name for _, content in written for text in _texts(content) for name in _VARIABLE.findall(text)
    }
    types = {leaf.name: leaf.type for leaf in leaves(schema)}
    for source, content in written:
        here: dict[str, str] = {}  # field: the name that this source gave it
        for name, value, key in _names(schema, content, aliases, source, referenced):
            if name.startswith("$"):
                variables[name[1:]] = value
                continue
            if value is None and name.endswith("."):
                given = {kept: value for kept, value in given.items() if not kept.startswith(name)}
                continue
            if key != name:
                if value is None and type(None) not in options(types[name]):
                    continue  # another name of a field, not used
                said.setdefault(*_differing(key, name))
            if here.get(name, key) != key and given[name] != value:
                other = here[name] if key == name else key
                say(f"tokenkit: {other} gives way to {name}, and both are set ({source or 'command line'})")
                if key != name:
                    continue
            value = _joined(name, given.get(name), value, say)
            here[name], given[name], origin[name] = key, value, source
    for alias, name in said.items():
        say(f"tokenkit: {alias} is read as {name}")
    return given, origin, variables


def _joined(name: str, before: Any, value: Any, say: Callable[[str], None]) -> Any:
    """Return a mapping with its changes; where one takes the place of another, say what is dropped."""
    if not isinstance(value, Mapping):
        return value
    before = before if isinstance(before, Mapping) else {}
    if isinstance(value, Changes):
        changed = dict(before)
        for path, item in value.items():
            *groups, last = path.split(".")
            node = changed
            for group in groups:
                inner = node.get(group)
                node[group] = node = dict(inner) if isinstance(inner, Mapping) else {}
            node[last] = item
        return changed
    if dropped := [str(key) for key in before if key not in value]:
        say(f"tokenkit: {name} is replaced as a whole: without {', '.join(dropped)}, which a file before had")
    return value


def _differing(key: str, name: str) -> tuple[str, str]:
    """Two names of a field without the end that they share: `new.x`, `student.x` as new, student."""
    while "." in key and "." in name and key.rpartition(".")[2] == name.rpartition(".")[2]:
        key, name = key.rpartition(".")[0], name.rpartition(".")[0]
    return key, name


def _refuse_secrets(name: str, value: Any, source: str) -> None:
    """Refuse a value that holds a key, however it came there. The value is never repeated.

    Raises:
        ConfigError: naming the field.
    """
    if any(has_secret(text) for text in _texts(plain(value))):
        raise ConfigError(
            f"{name} holds a key, or the value of a secret variable of the environment"
            + (f" ({source})" if source else "")
            + ", and configurations are saved with checkpoints: remove it; programs that need it read it "
            "from the environment themselves"
        )


def to_yaml(config: Any) -> str:
    """Write a configuration as a YAML file that `read_config` reads back to an equal one."""
    return dump_yaml(nested({name: _escape(value) for name, value in to_dict(config).items()}))


def from_dict(schema: type[T], values: Mapping[str, Any]) -> T:
    """Read what `to_dict` wrote to an equal configuration, in silence.

    Raises:
        ConfigError: a field that this version has not.
    """
    escaped = {name: _escape(value) for name, value in values.items()}
    return read_config(schema, (), escaped, say=lambda _: None)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values by dotted name, for a manifest or a tracker."""
    return {name: plain(value) for name, value in flatten(config).items()}


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _names(
    schema: type,
    content: Mapping[str, Any],
    aliases: Mapping[str, str],
    source: str,
    variables: Collection[str],
    prefixes: tuple[str, str] = ("", ""),
) -> Iterator[tuple[str, Any, str]]:
    """Every setting in a file: its canonical dotted name, its value, and its name as it was written.

    A group set to null is `group.` with None; a variable of the file is `$name`.
    """
    prefix, shown = prefixes
    valid = {leaf.name for leaf in leaves(schema)}
    groups = group_prefixes(schema)
    for key, value in content.items():
        written = prefix + str(key)
        name = canonical(written, aliases)
        if isinstance(value, Mapping) and any(alias.startswith(f"{written}.") for alias in aliases):
            inner = (f"{written}.", f"{shown}{key}.")  # a group whose fields have names of their own here
            yield from _names(schema, value, aliases, source, variables, inner)
        elif name in valid:
            yield name, value, shown + str(key)
        elif name + "." in groups and isinstance(value, Mapping):
            inner = (f"{name}.", f"{shown}{key}.")
            yield from _names(schema, value, aliases, source, variables, inner)
        elif name + "." in groups and value is None:
            yield name + ".", None, shown + str(key)
        elif isinstance(value, str) and (main := main_field(schema, name)) is not None:
            yield main, value, main
        elif name + "." in groups:
            raise ConfigError(
                f"{name}: expected a mapping, got {value!r}" + (f" ({source})" if source else "")
            )
        elif not prefix and key in variables:
            yield f"${key}", value, str(key)
        else:
            raise ConfigError(unknown_field(schema, prefix + _first_inside(str(key), value), source))


def _first_inside(name: str, value: Any) -> str:
    """The first setting inside an unknown group: its name here says more than that the group is unknown."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        name += f".{key}"
    return name


def canonical(name: str, aliases: Mapping[str, str]) -> str:
    """The name that an alias stands for, also where the alias is a group: `new.x` is `student.x`."""
    if name in aliases:
        return aliases[name]
    group, dot, rest = name.partition(".")
    return f"{aliases[group]}.{rest}" if dot and group in aliases else name


def looks_secret(name: str) -> bool:
    """A name that usually holds a credential."""
    return is_secret_name(name)


def _interpolate(schema: type, given: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve `${field}` and `${oc.env:VAR,default}`; fields that nobody set have their defaults."""
    texts = [text for value in given.values() for text in _texts(value)]
    if not any("${" in text for text in texts):
        return dict(given)
    _check_interpolations(texts)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    defaults = {leaf.name: plain(leaf.default) for leaf in leaves(schema) if _is_shown(leaf, given)}
    try:
        tree = OmegaConf.create(nested(defaults | dict(variables) | dict(given)))
        resolved: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key or 'configuration'}: cannot resolve the interpolation: {reason}"
        ) from error
    return {name: _look_up(resolved, name) for name in given}


def _is_shown(leaf: Leaf, given: Mapping[str, Any]) -> bool:
    group = leaf.name.rpartition(".")[0]
    return leaf.default is not MISSING and (not group or any(name.startswith(group + ".") for name in given))


def _check_interpolations(texts: Sequence[str]) -> None:
    for text in texts:
        for resolver in _RESOLVER.findall(text):
            if resolver != "oc.env":
                raise ConfigError(
                    f"the interpolation ${{{resolver}:...}} is not allowed: only ${{oc.env:VAR,default}} is"
                )
        for variable in _ENVIRONMENT.findall(text):
            if looks_secret(variable) or not re.fullmatch(r"\w+", variable):
                raise ConfigError(
                    f"${{oc.env:{variable}}} looks like a secret or no name, and configurations are saved; "
                    "programs that need it read it from the environment themselves"
                )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = list(value) if isinstance(value, tuple) else value
    return tree


def _look_up(tree: Mapping[str, Any], name: str) -> Any:
    node: Any = tree
    for part in name.split("."):
        node = node[part]
    return node


def _escape(value: Any) -> Any:
    """Keep a `${` that is meant literally from being read as an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value
