"""Folders of results are written once."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path


def check_vacant(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder that cannot take the files `names`, before the work that makes them.

    Raises:
        FileExistsError: `folder` is a file, or holds one of the files.
        OSError: it cannot be made, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output {folder} must be a folder and is a file: give another name")
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} exists: give --output another folder, or move the file away"
            )
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"is a file, so --output {folder} cannot be made", str(nearest)
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, f"nothing can be written there, for --output {folder}", str(nearest)
        )
