"""Files and folders: locks, writes that a crash cannot tear, outputs that are written once, a full disk.

What Linux and macOS offer and Windows does not, does nothing there under the same name. A lock that cannot
be had raises OSError, as on a disk without locks; callers say what they do then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenkit.errors import DiskError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
"""Flag of `os.open`: refuse a link."""
_BROKEN = (errno.EIO, errno.EROFS)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, *_BROKEN)
# libraries that write in other languages say it in words
_DISK_WORDS = ("No space left on device", "File too large", "Disk quota exceeded", "unexpected pos")


def lock(file: int | None, *, wait: bool = False) -> None:
    """Take the kernel's lock on an open file or folder; it ends with the process.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is off.
        OSError: this disk or system has no locks.
    """
    if fcntl is None or file is None:
        raise OSError("this system has no locks of this kind")
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
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


def is_disk_trouble(error: BaseException) -> bool:
    """Whether a disk would not take what was written; libraries say it in words, without a number."""
    number = getattr(error, "errno", None)
    return (
        isinstance(error, DiskError)
        or number in _DISK_ERRORS
        or any(words in str(error) for words in _DISK_WORDS)
    )


@contextlib.contextmanager
def blaming_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Say which file would not go to the disk, how large it is if that is known, and how much is free.

    Raises:
        DiskError: in place of an error that says that the disk is full, or a limit reached.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if not is_disk_trouble(error):
            raise
        raise DiskError(trouble_of_disk(path, error, needed)) from error


def trouble_of_disk(path: Path, error: BaseException, needed: int | None = None) -> str:
    """Say what would not go to the disk, how large it is if that is known, how much is free, what to do."""
    if isinstance(error, DiskError):
        return str(error)
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    if "unexpected pos" in reason:
        reason = "the disk is full, or files are limited in size (ulimit -f)"
    free = ""
    with contextlib.suppress(OSError):
        free = f", {free_bytes(path.parent)} bytes are free there"
    size = "" if needed is None else f", of {needed} bytes,"
    remedy = "mend the disk" if getattr(error, "errno", None) in _BROKEN else "make room"
    return f"{path}{size} could not be written: {reason}{free}; {remedy}, then go on with --resume"


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash the old content is there, or all of the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    data = content.encode() if isinstance(content, str) else content
    with blaming_disk(path, len(data)):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def is_path(name: str) -> bool:
    """Whether a name can only be one of this machine: the hub has NAME and OWNER/NAME."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def why_missing(name: str) -> str:
    """Say why no model or tokenizer can be had by a name; "" where it is here, or the hub may have it."""
    if Path(name).expanduser().exists():
        return ""
    if is_path(name):
        return "does not exist"
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if not constants.HF_HUB_OFFLINE or cached.is_dir():
        return ""
    return "does not exist, and offline (HF_HUB_OFFLINE) the hub is not asked: its cache has no such name"


def check_vacant(folder: Path, names: Iterable[str] | None = None, flag: str = "--output") -> None:
    """Refuse an output that holds something or cannot be written, before the work that makes it.

    Args:
        folder: is made later.
        names: the files that it shall take, beside others; None: it must be empty.
        flag: how the user names it.

    Raises:
        FileExistsError: `folder` is a file, holds one of the files, or is not empty.
        OSError: it cannot be made, or nothing can be written there.
    """
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(
            f"{flag} {folder} is a link that leads nowhere: remove it, or give another name"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{flag} {folder} must be a folder and is a file: give another name")
    if names is None and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{flag} {folder} is not empty: move it away, or name another folder")
    for name in names or ():
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} exists: give {flag} another folder, or move the file away"
            )
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"is a file, so {flag} {folder} cannot be made", str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, f"nothing can be written there, for {flag} {folder}", str(nearest)
        )
