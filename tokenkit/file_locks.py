"""What Linux and macOS offer for files and folders, and Windows does not: there the same names do without.

A lock that cannot be had raises OSError, as on a disk without locks; callers say what they do then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
"""Flag of `os.open`: refuse a link."""


def lock(file: int | None, *, wait: bool = False) -> None:
    """Take the kernel's lock on an open file or folder; it ends with the process.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is off.
        OSError: this disk or system has no locks.
    """
    if fcntl is None or file is None:
        raise OSError("this system has no locks of this kind")
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def opened(folder: Path) -> Iterator[int | None]:
    """Open a folder, to sync or lock it; gives None where folders cannot be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        yield None
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss, where that can be asked for."""
    with opened(folder) as handle:
        if handle is not None:
            os.fsync(handle)


def free_bytes(folder: Path) -> int:
    """Return how many bytes this user may still write on the disk of `folder`."""
    return shutil.disk_usage(folder).free
