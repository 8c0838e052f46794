"""The forms in which a command line may say a setting, all as `--a.b=value`.

--a.b value    --a.b=value    a.b=value    +a.b=value
--config FILE [FILE ...]    --config-name NAME    --config-path FOLDER    group=NAME
--student PATH    --data FILE    --lr RATE    --output FOLDER
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenkit.config.schema import group_prefixes, leaves, main_field, options
from tokenkit.config.shipped import find_config
from tokenkit.errors import ConfigError

SHORT = {
    "student": (
        "student.pretrained_model_name_or_path",
        "model.pretrained_model_name_or_path",
        "target_tokenizer_name",
    ),
    "teacher": ("teacher.pretrained_model_name_or_path", "teacher_tokenizer_name"),
    "model": ("model.pretrained_model_name_or_path", "student.pretrained_model_name_or_path"),
    "target": ("target_tokenizer_name",),
    "data": ("data.dataset_name", "file"),
    "lr": ("optimizer.learning_rate", "learning_rate"),
    "output": ("output", "output_dir"),
    "output_dir": ("output_dir", "output"),
}
"""Short flags, and the fields that they stand for: the first that a command has."""

IGNORED = ("--overrides", "--resolve")
"""Other programs put these between files and settings, or behind --cfg."""


@dataclass(slots=True)
class Words:
    """A command line, sorted."""

    files: list[str] = field(default_factory=list)
    """Configuration files by path or name, in order."""
    flags: list[str] = field(default_factory=list)
    """`--name`, `--name=value`, and the words behind a `--name`."""
    others: dict[str, str] = field(default_factory=dict)
    """`name=value` whose name is no field: an error, or a variable of a file."""
    folders: list[Path] = field(default_factory=list)
    """Where files are looked for by name."""
    prints: bool = False
    """The configuration is to be shown, not used."""


def short_forms(schema: type) -> dict[str, str]:
    """The short flags of a command, each with the field that it stands for."""
    names = {leaf.name for leaf in leaves(schema)}
    found = {short: [name for name in long if name in names] for short, long in SHORT.items()}
    return {short: long[0] for short, long in found.items() if long and short not in names}


def sort_words(arguments: Sequence[str], schema: type, known: Callable[[str], str]) -> Words:
    """Sort the words of a command line.

    Args:
        arguments: what stands behind the command.
        schema: the command's configuration.
        known: gives the field that a name or an alias stands for; other names come back as they are.

    Raises:
        ConfigError: --config, --config-name or --config-path without a value.
    """
    words, rest = Words(), list(arguments)
    types = {leaf.name: leaf.type for leaf in leaves(schema)}
    owner: str | None = None  # the flag that may take the next word
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag == "--config":
            owner = _take(words.files, flag, equals, value, rest)
        elif flag == "--config-name":
            owner = _take(words.files, flag, equals, value, rest) and None
        elif flag == "--config-path":
            folders: list[str] = []
            owner = _take(folders, flag, equals, value, rest) and None
            words.folders += map(Path, folders)
        elif flag in ("--print-config", "--cfg"):
            words.prints, owner = True, "--cfg" if argument == "--cfg" else None
        elif argument in IGNORED:
            owner = None
        elif argument.startswith("--"):
            words.flags.append(argument)
            owner = None if equals else known(argument[2:].replace("-", "_"))
        elif owner == "--cfg" and argument in ("job", "all", "hydra"):
            owner = None
        elif _is_setting(argument, owner, words, types, known):
            _take_setting(argument, schema, words, known)
            owner = owner if owner == "--config" else None  # a flag before it takes no more words
        elif owner == "--config":
            words.files.append(argument)
        else:
            words.flags.append(argument)
    return words


def _take(found: list[str], flag: str, equals: str, value: str, rest: list[str]) -> str | None:
    """Take the value of an option of files; return the option if more words may follow."""
    if equals:
        found.append(unquoted(value))
        return None
    if not rest or rest[0].startswith("-"):
        more = "FILE [FILE ...]" if flag == "--config" else "VALUE"
        raise ConfigError(
            f"{flag} needs {'at least one file' if more[0] == 'F' else 'a value'}: {flag} {more}"
        )
    found.append(rest.pop(0))
    return flag


def _is_setting(
    argument: str, owner: str | None, words: Words, types: Mapping[str, Any], known: Callable[[str], str]
) -> bool:
    """Whether a word is `name=value`, and not the value of the flag before it."""
    match = re.match(r"\+{0,2}([A-Za-z_][\w.-]*)=", argument)
    if match is None or (owner == "--config" and Path(argument).exists()):
        return False
    if owner is None or owner == "--config" or argument.startswith("+"):
        return True
    is_value = words.flags[-1].startswith("--") and bool not in options(types.get(owner))
    takes_pairs = any("Mapping" in str(option) for option in options(types.get(owner)))
    name = known(match[1].replace("-", "_"))
    return name in types and (takes_pairs or not is_value)


def _take_setting(argument: str, schema: type, words: Words, known: Callable[[str], str]) -> None:
    """`a.b=c` as `--a.b=c`; `group=name` as the file group/name where there is one."""
    written, _, value = argument.lstrip("+").partition("=")
    value = unquoted(value)
    name = known(written.replace("-", "_"))
    members = find_config(f"models/{value}", words.folders) if name == written == "models" else None
    if members is not None and not Path(value).exists():  # a list that is a file of that name
        words.files.append(str(members))
        return
    if name in {leaf.name for leaf in leaves(schema)} and written + "." not in group_prefixes(schema):
        words.flags.append(f"--{written}={value}")
        return
    file = find_config(f"{written}/{value}", words.folders) if value and "." not in written else None
    if file is not None:
        words.files.append(str(file))
    elif main_field(schema, written) is not None:
        words.flags.append(f"--{main_field(schema, written)}={value}")
    else:
        words.others[written] = value


def with_positions(arguments: Sequence[str], *names: str) -> list[str]:
    """The words at the front that have no name, behind the flags `names`: `RUN -x` is `--run=RUN -x`."""
    words, found = list(arguments), []
    for name in names:
        if not words or words[0].startswith("-") or re.match(r"\+{0,2}[A-Za-z_][\w.-]*=", words[0]):
            break
        found.append(f"--{name}={words.pop(0)}")
    return found + words


def unquoted(value: str) -> str:
    """A value without the quotes that some shells leave around it."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def split_commas(text: str) -> list[str]:
    """The parts of `a,b(1,2),[c,d]`, cut at commas outside of brackets and quotes.

    Raises:
        ConfigError: a bracket or a quote is left open, or a part is empty.
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    if depth or quote or (len(parts) > 1 and not all(parts)):
        raise ConfigError(
            f"{text!r} cannot be cut at its commas: a bracket or quote is open, or a part empty"
        )
    return [unquoted(part) for part in parts]
