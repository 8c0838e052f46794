"""The folder of a run: who may write there, and writes that a crash cannot tear."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenkit.disk import NO_LINK, lock, opened
from tokenkit.run.redaction import complain

LOCK_NAME = ".lock"
OUTCOME_NAME = "outcome.json"
HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 600.0  # twenty heartbeats: a lock of another machine this old has no owner
WRITTEN = frozenset(  # what runs write at the top of their folder; others are replaced
    (
        LOCK_NAME,
        OUTCOME_NAME,
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "expert_usage.png",
        "checkpoints",
        "export",
        "facts.json",
        "run_id",
        "hypernet.json",
        "hypernet.safetensors",
    )
)


def prepare_output(folder: Path, *, resume: bool) -> None:
    """Make the folder of a run and its parents, or refuse one that holds something; see `check_output`.

    Raises:
        PermissionError: nothing can be written there.
    """
    check_output(folder, resume=resume)
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    probe = folder / f"{LOCK_NAME}-probe-{secrets.token_hex(4)}"
    try:
        probe.touch()
    except OSError as error:
        raise PermissionError(
            f"output_dir {folder} cannot be written ({error.strerror}): choose another folder, "
            "or make this one writable"
        ) from error
    probe.unlink()


def check_output(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds something else than the run that goes on there; nothing is made.

    Args:
        folder: `output_dir`.
        resume: go on with what is there; an empty folder then starts a new run.

    Raises:
        FileExistsError: the folder is not empty and `resume` is off, or holds a link.
        NotADirectoryError: the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir must be a folder: {folder} is a file, choose another path")
    if not folder.exists():
        return
    _refuse_links(folder)
    content = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(LOCK_NAME))
    if content == [
        OUTCOME_NAME
    ]:  # a run that ended before it began: its mistake may be mended and tried again
        content = []
    if content and not resume:
        raise FileExistsError(
            f"output_dir {folder} must be empty for a new run, and it holds {', '.join(content[:3])}: "
            "pass --resume to go on with that run, or choose another folder"
        )


def _refuse_links(folder: Path) -> None:
    """Nothing is written through a link, hence nothing outside the folder."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and (entry.name in WRITTEN or entry.name.startswith(LOCK_NAME)):
            raise FileExistsError(
                f"{entry} is a link, and the run would write through it: remove it, or name another output "
                "folder (which may itself be a link)"
            )


@contextlib.contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """Make a folder beside `final`, which gets that name when the block ends; an error removes it.

    Folders of that kind whose maker was killed are removed: the kernel's lock of those at work is held.
    """
    for path in sorted(final.parent.glob(f".{final.name}-*")):
        is_ours = re.fullmatch(r"[0-9a-f]{8}", path.name.removeprefix(f".{final.name}-"))
        if is_ours and path.is_dir() and not path.is_symlink():
            with _held(path) as is_held:
                said = "was left by an export that was cut off"
                if is_held:
                    shutil.rmtree(path, ignore_errors=True)
                    complain(f"tokenkit: removed {path}, which {said}")
                elif is_held is False:
                    complain(f"tokenkit: {path} may have been left by an export that was cut off: remove it")
    staging = final.with_name(f".{final.name}-{secrets.token_hex(4)}")
    staging.mkdir(parents=True)
    with _held(staging):
        try:
            yield staging
            if final.exists():
                final.rmdir()  # empty, or the rename would lose something
            os.rename(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextlib.contextmanager
def _held(folder: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Hold the kernel's lock on a folder; gives what `_lock` returns."""
    with opened(folder) as handle:
        yield _lock(handle, wait=wait)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep processes apart while they read and write the same file. It ends with the process."""
    with _held(folder, wait=True):  # but on network disks without such locks
        yield


class RunLock:
    """One run per folder. Use it as a context around everything that writes there.

    The file `.lock` names its owner, who holds a lock of the kernel on it (flock): that ends with the
    process, whatever ended it, and is seen from every container of the machine, and over NFS from every
    machine. On a disk without such locks, or where the owner is another machine that they do not reach,
    the file holds until `STALE_SECONDS` without a heartbeat.

    Raises:
        BlockingIOError: another run holds the folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_NAME
        self.owner = json.dumps(identity())
        self._file: int | None = None
        self._stop = threading.Event()

    def __enter__(self) -> RunLock:
        """Take the lock."""
        with one_at_a_time(self.path.parent):
            self._file = self._take()
        threading.Thread(target=self._beat, name="tokenkit-lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back, if it is still ours."""
        self._stop.set()
        with contextlib.suppress(OSError), one_at_a_time(self.path.parent):
            if self.is_held():  # nobody may open it now, and lock it when it has no name any more
                self.path.unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def is_held(self) -> bool:
        """Whether the folder still has the file that this run made."""
        if self._file is None:
            return False
        with contextlib.suppress(OSError):
            return os.path.samestat(os.lstat(self.path), os.fstat(self._file)) and self._read() == self.owner
        return False

    def _take(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o640)
        except OSError as error:
            raise FileExistsError(
                f"{self.path} cannot be opened ({error.strerror}): it must be a plain file; remove it"
            ) from error
        try:
            is_sure = _lock(file)
            if is_sure is None or self._may_be_alive(file, is_sure):
                raise BlockingIOError(
                    f"{self.path.parent} is in use by another run ({self._read()}): wait for it, choose "
                    f"another output_dir, or delete {self.path} if you know that run to be gone"
                )
            os.ftruncate(file, 0)
            os.pwrite(file, self.owner.encode(), 0)
        except BaseException:
            os.close(file)
            raise
        return file

    def _may_be_alive(self, file: int, is_sure: bool) -> bool:
        """Whether an owner whom the kernel does not know of may be at work."""
        found = self._read()
        if not found:
            return False
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if is_sure and json.loads(found)["boot"] == identity()["boot"]:
                return False  # an owner on this machine would hold the kernel's lock
        return self._age(file) <= STALE_SECONDS

    def _read(self) -> str:
        with contextlib.suppress(OSError):
            return self.path.read_bytes()[:1000].decode("utf-8", errors="replace")
        return ""

    def _age(self, file: int) -> float:
        """Seconds since the last heartbeat, by the clock of the disk."""
        probe = self.path.with_name(f"{LOCK_NAME}-clock-{secrets.token_hex(8)}")
        probe.touch()
        try:
            return probe.stat().st_mtime - os.fstat(file).st_mtime
        finally:
            probe.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            if self.is_held():
                with contextlib.suppress(OSError):
                    os.utime(self.path, (time.time(), time.time()), follow_symlinks=False)


@contextlib.contextmanager
def owned(folder: Path, *, resume: bool) -> Iterator[RunLock]:
    """Take the folder of a run, made where it is not there: see `prepare_output` and `RunLock`."""
    prepare_output(folder, resume=resume)
    with RunLock(folder) as lock:
        yield lock


def _lock(file: int | None, *, wait: bool = False) -> bool | None:
    """True: locked; None: somebody else has it; False: this disk has no locks."""
    try:
        lock(file, wait=wait)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def identity() -> dict[str, Any]:
    """Name this process to people, and its machine: containers of one machine share its boot."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"host": socket.gethostname(), "boot": boot, "pid": os.getpid(), "started": started}
