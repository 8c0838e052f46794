"""Folders of results are written once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def check_vacant(folder: Path, names: Iterable[str]) -> None:
    """Raise FileExistsError if `folder` is a file, or holds one of the files `names`."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output {folder} must be a folder and is a file: give another name")
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} exists: give --output another folder, or move the file away"
            )
