"""`tokenkit configs`: the configuration files that come with the package, and those of others as ours.

tokenkit configs
tokenkit configs show data/text_file
tokenkit configs copy cross_tokenizer_distill mine.yaml
tokenkit configs convert theirs.yaml ours.yaml
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenkit.cli import run
from tokenkit.config import ConfigError
from tokenkit.config.shipped import SHIPPED, missing, shipped_names
from tokenkit.errors import nearest

USAGE = """usage: tokenkit configs [list]
       tokenkit configs show NAME
       tokenkit configs copy NAME|all DESTINATION
       tokenkit configs convert OLD.yaml NEW.yaml

list     The files that come with the package. --config NAME uses one at any command; files of groups
         (data/, models/, optimizer/, two_stage/) stand behind a whole one.
show     Print one.
copy     Copy one, or all of them into a folder. What exists is never overwritten.
convert  Write a training configuration of tokenkit in JAX as one of ours: docs/configs.md.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: configs(list(sys.argv[1:] if argv is None else argv)))


def configs(arguments: list[str]) -> None:
    """List, show, copy or convert.

    Raises:
        ConfigError: no such verb, file or field.
        FileExistsError: the destination exists.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    verb, *rest = arguments or ["list"]
    counts = {"list": 0, "show": 1, "copy": 2, "convert": 2}
    if verb not in counts:
        raise ConfigError(
            f"{verb!r} is no verb of configs{nearest(verb, counts)}; verbs: {', '.join(counts)}"
        )
    if len(rest) != counts[verb]:
        raise ConfigError(
            f"configs {verb} takes {counts[verb]} words, got {len(rest)}; tokenkit configs --help"
        )
    if verb == "list":
        print_list()
    elif verb == "show":
        print(shipped(rest[0]).read_text(encoding="utf-8"), end="")
    elif verb == "copy":
        for path in copy(rest[0], Path(rest[1]).expanduser()):
            print(path)
    else:
        from tokenkit.config.convert import convert

        for line in convert(Path(rest[0]).expanduser(), Path(rest[1]).expanduser()):
            print(line, file=sys.stderr)
        print(rest[1])


def print_list() -> None:
    """Print each name with the first sentence of its file."""
    names = shipped_names()
    width = max(map(len, names))
    for name in sorted(names, key=lambda name: ("/" in name, name)):
        lines = itertools.takewhile(
            lambda line: line.startswith("# "), shipped(name).read_text().splitlines()
        )
        print(f"{name.ljust(width)}  {' '.join(line[2:] for line in lines).partition('. ')[0].rstrip('.')}")


def shipped(name: str) -> Path:
    """The file of a name.

    Raises:
        ConfigError: there is none.
    """
    path = SHIPPED / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise ConfigError(missing(name))
    return path


def copy(name: str, destination: Path) -> list[Path]:
    """Copy a file to a path or into a folder; `all` copies every file into a folder.

    Raises:
        ConfigError: no such file.
        FileExistsError: a file stands in the way; nothing is copied then.
    """
    if name == "all":
        targets = {shipped(inner): destination / f"{inner}.yaml" for inner in shipped_names()}
    else:
        file = shipped(name)
        targets = {file: destination / file.name if destination.is_dir() else destination}
    for target in targets.values():
        if target.exists() or target.is_symlink():
            raise FileExistsError(f"{target} exists, and is not overwritten: name another destination")
    for file, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as copied:
            copied.write(file.read_text(encoding="utf-8"))
    return list(targets.values())


if __name__ == "__main__":
    raise SystemExit(main())
