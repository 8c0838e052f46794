"""Files, then flags, then interpolation, then types: from what a user wrote to a configuration."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from tokenkit.config.effects import without_effect
from tokenkit.config.errors import ConfigError, nearest
from tokenkit.config.schema import Leaf, build, flatten, group_prefixes, leaves
from tokenkit.config.values import coerce, plain
from tokenkit.config.yaml_files import dump_yaml, read_yaml
from tokenkit.redaction import has_secret, is_secret_name

T = TypeVar("T")

SYNONYMS = {
    "lr": "learning_rate",
    "model": "pretrained_model_name_or_path",
    "model_name": "pretrained_model_name_or_path",
    "model_name_or_path": "pretrained_model_name_or_path",
    "base_model": "pretrained_model_name_or_path",
    "tokenizer": "target_tokenizer_name",
    "target": "target_tokenizer_name",
    "dataset": "dataset_name",
    "train_file": "dataset_name",
    "dataset_name": "data",
    "max_steps": "steps",
    "num_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "max_length": "max_length_new",
    "max_seq_length": "max_length_new",
    "loss": "losses",
    "lora_rank": "model_lora_rank",
    "lora_r": "model_lora_rank",
    "lora_alpha": "model_lora_alpha",
    "logging_steps": "logging_interval",
    "save_steps": "save_interval",
    "eval_steps": "eval_interval",
    "epochs": "steps",
    "num_train_epochs": "steps",
    "output_folder": "output_dir",
    "out": "output",
}
"""What other programs call a field: the last part of its name here."""

_OPEN = r"(?<!\\)(?:\\\\)*\$\{\s*"  # a backslash in front makes it ordinary text
_RESOLVER = re.compile(_OPEN + r"([\w.]+)\s*:")
_ENVIRONMENT = re.compile(_OPEN + r"oc\.env\s*:\s*([^,}\s]+)")


def read_config(
    schema: type[T],
    files: Sequence[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    aliases: Mapping[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> T:
    """Read a configuration.

    Args:
        schema: a frozen dataclass, see `tokenkit.config.schema`.
        files: YAML files; a later one wins, field by field.
        overrides: values by dotted name, such as flags; they win over files.
        aliases: other names of fields and groups.
        say: takes one line for each alias that was used, and one about options that nothing will read; None:
            standard error.

    Raises:
        ConfigError: one line that names the field, where it was set, and what to do.
    """
    aliases = aliases or {}
    used: dict[str, str] = {}
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    written = [(str(file), read_yaml(Path(file))) for file in files]
    for source, content in [*written, ("", dict(overrides or {}))]:
        for name, value in _names(schema, content, aliases, used, source):
            if value is None and name.endswith("."):
                given = {key: kept for key, kept in given.items() if not key.startswith(name)}
                continue
            given[name], origin[name] = value, source
    for alias, name in used.items():
        (say or _warn)(f"tokenkit: {alias} is read as {name}")
    values = _interpolate(schema, given)
    types = {leaf.name: leaf.type for leaf in leaves(schema)}  # type: ignore[arg-type]
    typed = {}
    for name, value in values.items():
        try:
            typed[name] = coerce(types[name], value, name)
        except ConfigError as error:
            source = origin[name]
            raise ConfigError(f"{error} ({source})" if source else str(error)) from error
        _refuse_secrets(name, typed[name], origin[name])
    config = build(schema, typed)
    if (idle := without_effect(config, typed)) is not None:
        (say or _warn)(idle)
    return config


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
    values = {name: _escape(plain(value)) for name, value in flatten(config).items()}
    return dump_yaml(_nest(values))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values by dotted name, for a manifest or a tracker."""
    return {name: plain(value) for name, value in flatten(config).items()}


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _names(
    schema: type,
    content: Mapping[str, Any],
    aliases: Mapping[str, str],
    used: dict[str, str],
    source: str,
    prefix: str = "",
) -> list[tuple[str, Any]]:
    """Every setting in a file by its canonical dotted name; `group.` with None for a group set to null."""
    valid = {leaf.name for leaf in leaves(schema)}
    groups = group_prefixes(schema)
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = canonical(prefix + str(key), aliases)
        if name != prefix + str(key):
            used[prefix + str(key)] = name
        if name in valid:
            found.append((name, value))
        elif name + "." in groups and isinstance(value, Mapping):
            found += _names(schema, value, aliases, used, source, name + ".")
        elif name + "." in groups and value is None:
            found.append((name + ".", None))
        elif name + "." in groups:
            raise ConfigError(
                f"{name}: expected a mapping, got {value!r}" + (f" ({source})" if source else "")
            )
        else:
            raise ConfigError(unknown_field(schema, prefix + str(key), source))
    return found


def canonical(name: str, aliases: Mapping[str, str]) -> str:
    """The name that an alias stands for, also where the alias is a group: `new.x` is `student.x`."""
    if name in aliases:
        return aliases[name]
    group, dot, rest = name.partition(".")
    return f"{aliases[group]}.{rest}" if dot and group in aliases else name


def unknown_field(schema: type, name: str, source: str = "") -> str:
    """What to say of a field that does not exist: the nearest one, and where its name is nested.

    The value is never repeated: it may be a secret.
    """
    where = f" ({source})" if source else ""
    valid = [leaf.name for leaf in leaves(schema)]
    last = name.rsplit(".", 1)[-1]
    if looks_secret(last):
        return (
            f"{name} looks like a secret{where}, and configurations are saved with checkpoints: remove it "
            "and pass it through the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    if name + "." in group_prefixes(schema):
        inside = [other for other in valid if other.startswith(name + ".")]
        more = f", or {', '.join(inside[1:4])}" + (", ..." if len(inside) > 4 else "") if inside[1:] else ""
        return f"{name} is a group of fields{where}: set {inside[0]}{more}"
    nested = [other for other in valid if other.rsplit(".", 1)[-1] in (last, SYNONYMS.get(last))]
    if nested:
        return f"unknown field {name}{where}: it is {' or '.join(nested)}"
    hint = nearest(name, valid) or nearest(last, [other.rsplit(".", 1)[-1] for other in valid])
    return f"unknown field {name}{where}{hint or '; --help lists all fields'}"


def looks_secret(name: str) -> bool:
    """A name that usually holds a credential."""
    return is_secret_name(name)


def _interpolate(schema: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve `${field}` and `${oc.env:VAR,default}`; fields that nobody set have their defaults."""
    texts = [text for value in given.values() for text in _texts(value)]
    if not any("${" in text for text in texts):
        return dict(given)
    _check_interpolations(texts)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    defaults = {leaf.name: plain(leaf.default) for leaf in leaves(schema) if _is_shown(leaf, given)}
    try:
        tree = OmegaConf.create(_nest(defaults | dict(given)))
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


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
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
