"""Flags and help of a configuration, through tyro. One flag per field, `--a-b` and `--a_b` alike.

tyro splits the command line and writes the help; values go through the same rules as YAML, so that a
wrong one gives the same message from either side.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import cache, reduce
from typing import Annotated, Any, TypeVar

from tokenkit.config.forms import short_forms, sort_words, split_commas
from tokenkit.config.later import feature_of, spell
from tokenkit.config.paths import check_paths
from tokenkit.config.read import Changes, canonical, read_config, to_yaml
from tokenkit.config.schema import Leaf, heading, leaves, main_field, options
from tokenkit.config.unknown import unknown_field
from tokenkit.config.values import describe
from tokenkit.config.yaml_files import load_yaml
from tokenkit.errors import ConfigError

T = TypeVar("T")

_NOT_GIVEN = ("",)

WITH_COMMAS = ("tokens_to_add", "prompts", "stop")
"""Lists whose items may hold a comma: on the command line only spaces part them."""


def parse_command_line(
    schema: type[T],
    arguments: Sequence[str] | None = None,
    *,
    program: str,
    aliases: Mapping[str, str] | None = None,
    finds_paths: bool = True,
) -> T:
    """Read `--config FILE [FILE ...]`, flags and `name=value` into a configuration; files give way.

    `--help` and `--print-config` print and end the process with 0. `finds_paths`: each path must lead
    somewhere.

    Raises:
        ConfigError: one line that says what is wrong.
        FileNotFoundError: a path that leads nowhere.
    """
    aliases = output_aliases(schema) | dict(aliases or {})
    shorts = short_forms(schema)
    given = sys.argv[1:] if arguments is None else arguments
    words = sort_words(given, schema, lambda name: shorts.get(name) or canonical(name, aliases))
    used: dict[str, str] = {}
    flags = [canonical_flag(schema, flag, aliases, used) for flag in words.flags]
    overrides = _flags(schema, flags, program, _description(schema, aliases)) | words.others
    for alias, name in used.items():
        _say(f"tokenkit: --{alias} is read as --{name}")
    config = read_config(schema, words.files, overrides, aliases=aliases, folders=words.folders, say=_say)
    if words.prints:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    if finds_paths:
        check_paths(config)
    return config


def take_own(
    arguments: Sequence[str], readers: Mapping[str, Callable[[str], Any] | None], program: str
) -> tuple[dict[str, Any], list[str]]:
    """Split the options of a command itself from those of the configuration that it takes beside.

    Args:
        arguments: the command line.
        readers: by flag without dashes, what makes its value of a word; None: the flag stands alone.
        program: for errors.

    Returns:
        Values by name, underscores in place of dashes, and the words that are left.

    Raises:
        ConfigError: an option without its value, or a value that is none.
    """
    values: dict[str, Any] = {}
    rest, left = [], list(arguments)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("_", "-") if flag.startswith("--") else ""
        if name not in readers:
            rest.append(word)
            continue
        reader = readers[name]
        if reader is None and equals:
            raise ConfigError(f"{flag} takes no value: got {value!r}")
        if reader is not None and not equals and not left:
            raise ConfigError(f"{flag} needs a value; {program} --help lists the options")
        try:
            value = value if equals or reader is None else left.pop(0)
            values[name.replace("-", "_")] = True if reader is None else reader(value)
        except ValueError as error:
            raise ConfigError(f"{flag}: {value!r} is no number") from error
    return values, rest


def output_aliases(schema: type) -> dict[str, str]:
    """Where a command writes is `output_dir` to one, `output` to others: each takes both names."""
    names = {leaf.name for leaf in leaves(schema)}
    return {"output_dir": "output"} if "output" in names and "output_dir" not in names else {}


def canonical_flag(schema: type, argument: str, aliases: Mapping[str, str], used: dict[str, str]) -> str:
    """`--log_interval=5` as `--logging-interval=5`, `--no-x` as `--x=false`, `--lr` as its field."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    name = flag.replace("-", "_")
    short = short_forms(schema).get(name)
    known = short or canonical(name, aliases)
    if known != name and short is None:
        used[flag] = known.replace("_", "-")
    types = {leaf.name: leaf.type for leaf in leaves(schema)}
    known = known if known in types else main_field(schema, known) or known
    group, dot, last = known.rpartition(".")
    positive = group + dot + last.removeprefix("no_")
    if known not in types and last.startswith("no_") and bool in options(types.get(positive)) and not equals:
        return f"--{positive.replace('_', '-')}=false"
    return "--" + known.replace("_", "-") + equals + value


def _flags(schema: type, arguments: list[str], program: str, description: str) -> dict[str, Any]:
    """What the command line sets, by dotted name, as YAML would hold it."""
    import tyro

    values, unknown = tyro.cli(
        _view(schema),
        args=arguments,
        prog=program,
        description=description,
        return_unknown_args=True,
    )
    if unknown:
        raise ConfigError(_unknown_argument(schema, unknown))
    given: dict[str, Any] = {}
    types = {leaf.name: leaf.type for leaf in leaves(schema)}
    for name, words in _collect(schema, values):
        if words is not _NOT_GIVEN:
            given[name] = from_words(types[name], words, name)
    return given


def _unknown_argument(schema: type, unknown: Sequence[str]) -> str:
    first = unknown[0]
    if first.startswith("-"):
        name = first.lstrip("-").partition("=")[0]
        return unknown_field(schema, name.replace("-", "_"), "command line")
    hint = (
        "pass configuration files with --config"
        if first.endswith((".yaml", ".yml"))
        else "flags begin with --"
    )
    return f"unexpected argument {first!r}: {hint}"


def from_words(hint: Any, words: Sequence[str], name: str) -> Any:
    """The words after a flag as YAML would hold them.

    A list is its words, cut at commas; a mapping is `key=value` words; either may be one word of YAML:
    `[a, b]`, `{a: 1}`. Words change the mapping of a file, YAML takes its place.

    Raises:
        ConfigError: no value or too many.
    """
    flag = "--" + name.replace("_", "-")
    wanted = options(hint)
    if bool in wanted and not words:
        return True
    if len(words) == 1 and re.match(r"\s*[\[{]", words[0]) and str not in wanted:
        return load_yaml(words[0], flag)
    if len(words) == 1 and words[0] in ("null", "none", "None") and type(None) in wanted:
        return None
    if len(words) == 1 and float in wanted and not re.search("[=,]", words[0]):
        return words[0]
    if _takes_many(hint):
        if name not in WITH_COMMAS:
            words = [part for word in words for part in (split_commas(word) if "," in word else [word])]
        pairs = [word.partition("=") for word in words]
        takes_mapping = any("Mapping" in str(option) for option in wanted)
        if takes_mapping and words and all(equals for _, equals, _ in pairs):
            if any("Any" in str(option) for option in wanted):
                return Changes({key: load_yaml(value, flag) for key, _, value in pairs})
            return Changes({key: value for key, _, value in pairs})
        return list(words)
    if len(words) != 1:
        got = f"got {len(words)}: {' '.join(words)}" if words else "got none"
        raise ConfigError(f"{flag} takes one value ({describe(hint)}), {got}")
    return words[0]


def _takes_many(hint: Any) -> bool:
    return any(str(option).startswith(("tuple", "collections.abc.Mapping")) for option in options(hint))


@cache
def _view(schema: type, prefix: str = "") -> Any:
    """A dataclass for tyro: the tree that the names make, every value a list of words, or _NOT_GIVEN."""
    fields: dict[str, Any] = {}
    inside = [leaf for leaf in leaves(schema) if leaf.name.startswith(prefix)]
    for leaf in inside:
        first, dot, _ = leaf.name[len(prefix) :].partition(".")
        if not dot:
            fields[first] = (first, _view_leaf(leaf), dataclasses.field(default=_NOT_GIVEN))
        elif first not in fields:
            view = _view(schema, f"{prefix}{first}.")
            fields[first] = (first, view, dataclasses.field(default_factory=view))
    view = dataclasses.make_dataclass(schema.__name__, fields.values(), kw_only=True)
    view.__doc__ = heading(inside[0]) if prefix else schema.__doc__
    return view


def _view_leaf(leaf: Leaf) -> Any:
    """The type of one flag: words, with help, default and what to write."""
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec

    spec: Any = PrimitiveConstructorSpec(
        nargs=(0, 1) if bool in options(leaf.type) else "*",
        metavar=_metavar(leaf.type),
        instance_from_str=list,
        is_instance=lambda _: True,
        str_from_instance=lambda _: [],
    )
    later = feature_of(leaf.name)
    help_text = leaf.help + (f" Comes with {later}." if later else "")
    default = "(required)" if leaf.default is MISSING else f"(default: {spell(leaf.default)})"
    return Annotated[
        object,
        spec,
        tyro.conf.arg(
            name=leaf.name.rpartition(".")[2].replace("_", "-"), help=help_text, help_behavior_hint=default
        ),
    ]


def _metavar(hint: Any) -> str:
    words = []
    for option in options(hint):
        text = str(option)
        if option in (int, float, str, bool):
            words.append({int: "INT", float: "FLOAT", str: "TEXT", bool: "[true|false]"}[option])
        elif text.startswith("typing.Literal"):
            words.append("{" + ",".join(option.__args__) + "}")
        elif text.startswith("tuple"):
            words.append(f"[{_metavar(option.__args__[0])} ...]")
        elif text.startswith("collections.abc.Mapping"):
            words.append("[NAME=VALUE ...]")
        elif dataclasses.is_dataclass(option):
            words.append("{FIELD: VALUE}")
    return " | ".join(words)


def _collect(schema: type, view: Any) -> list[tuple[str, Any]]:
    """Read what tyro filled, by the names that the schema knows."""
    return [(leaf.name, reduce(getattr, leaf.name.split("."), view)) for leaf in leaves(schema)]


def _description(schema: type, aliases: Mapping[str, str]) -> str:
    """What stands above the list of flags."""
    shorts = ", ".join(
        f"--{short.replace('_', '-')} for {name}" for short, name in short_forms(schema).items()
    )
    others = ", ".join(f"{alias} for {name}" for alias, name in aliases.items())
    paragraphs = [
        (schema.__doc__ or "").strip(),
        "--config FILE [FILE ...] reads YAML with the same names, from a path or by the name of a file that "
        "`tokenkit configs` lists: a later file wins, flags win over all.",
        "--print-config shows the resolved configuration and stops. --a-b and --a_b are the same flag; "
        "--a.b c, --a.b=c and a.b=c say the same.",
        *([f"Short: {shorts}."] if shorts else []),
        *([f"Other names: {others}."] if others else []),
    ]
    return "\n\n".join(paragraphs)


def _say(line: str) -> None:
    """One line on standard error, from one process of a torchrun group."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
