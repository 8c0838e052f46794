"""Configuration files by name: those that come with the package, and those that a file names (`defaults`)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenkit.config.yaml_files import read_yaml
from tokenkit.errors import ConfigError, nearest

SHIPPED = Path(__file__).parents[1] / "configs"
MOST_FILES = 100
"""Of one configuration, those that its files name included."""

Written = list[tuple[str, dict[str, Any]]]


def shipped_names() -> list[str]:
    """Names of the files that come with the package, such as `data/text_file`."""
    return sorted(str(file.relative_to(SHIPPED).with_suffix("")) for file in SHIPPED.rglob("*.yaml"))


def find_config(name: str | Path, folders: Sequence[Path] = ()) -> Path | None:
    """Return a configuration file: a path as it stands, or a name, with or without its ending.

    A name is looked up from here, then in `folders`, then among the files of the package, where `configs/` in
    front is allowed. None: there is no such file.
    """
    text = str(name)
    for folder in (Path(), *folders, SHIPPED):
        inner = text.removeprefix("configs/") if folder == SHIPPED else text
        for ending in ("", ".yaml", ".yml"):
            path = folder / f"{inner}{ending}" if inner else folder
            if path.is_file():
                return path
    return None


def read_configs(files: Sequence[str | Path], folders: Sequence[Path] = ()) -> Written:
    """Read files in order, each behind those that it names under `defaults`.

    Returns:
        Pairs of the file and what it holds; a later one wins.

    Raises:
        ConfigError: a file is missing or no configuration, names itself, or there are too many.
    """
    written: Written = []
    for file in files:
        path = find_config(file, folders)
        if path is None:
            raise ConfigError(missing(file, folders))
        _read(path, written, (), folders)
    return written


def _read(path: Path, written: Written, above: tuple[Path, ...], folders: Sequence[Path]) -> None:
    if path in above or len(written) >= MOST_FILES:
        chain = " -> ".join(str(file) for file in (*above, path))
        raise ConfigError(f"defaults: {chain} leads in a circle, or names more than {MOST_FILES} files")
    content = read_yaml(path)
    entries = content.pop("defaults", [])
    if not isinstance(entries, list):
        raise ConfigError(f"defaults: expected a list of files or of `group: name`, got {entries!r} ({path})")
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    for entry in entries:
        if entry == "_self_":
            written.append((str(path), content))
            continue
        for name in _names(entry, path):
            found = find_config(name, (path.parent, *folders))
            if found is None:
                raise ConfigError(f"defaults: {missing(name, (path.parent, *folders))} ({path})")
            _read(found, written, (*above, path), folders)


def _names(entry: Any, path: Path) -> list[str]:
    """`models: llama_qwen` as models/llama_qwen; a group set to null is left out."""
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, dict) and all(isinstance(name, str) or name is None for name in entry.values()):
        return [f"{group}/{name}" for group, name in entry.items() if name is not None]
    raise ConfigError(f"defaults: expected a name, or `group: name`, got {entry!r} ({path})")


OF_OTHERS = ("mkdocs.yml", "docker-compose.yml", ".pre-commit-config.yaml")
"""YAML files that lie about in a project and configure no command here."""


def missing(name: str | Path, folders: Sequence[Path] = ()) -> str:
    """What to say of a file that nowhere is: the nearest name, and those that exist."""
    path = Path(name)
    own = next((folder for folder in (path.parent, *folders) if folder.is_dir()), Path())
    existing = sorted(str(file) for file in own.glob("*.y*ml") if file.name not in OF_OTHERS)
    listed = f"those in {own} are {', '.join(existing)}" if existing else f"there are none in {own}"
    shipped = shipped_names()
    inner = str(path.with_suffix("")).removeprefix("configs/")
    near = nearest(inner, shipped) or nearest(path.stem, shipped)
    return (
        f"the configuration file {name} does not exist{near} (looked from {os.getcwd()}); {listed}; "
        f"shipped ones are {', '.join(shipped)}"
    )
