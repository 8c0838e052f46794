"""The folder of a run: who may write there, and writes that a crash cannot tear."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

LOCK_NAME = ".lock"
OUTCOME_NAME = "outcome.json"
HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 600.0  # twenty heartbeats: a lock of another machine this old has no owner


def prepare_output(folder: Path, *, resume: bool) -> None:
    """Make the folder of a run, or refuse one that holds something.

    Args:
        folder: `output_dir`; its parents are made too.
        resume: go on with what is there; an empty folder then starts a new run.

    Raises:
        FileExistsError: the folder is not empty and `resume` is off.
        NotADirectoryError: the path is a file.
        PermissionError: nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir must be a folder: {folder} is a file, choose another path")
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
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
    probe = folder / f"{LOCK_NAME}-probe-{secrets.token_hex(4)}"
    try:
        probe.touch()
    except OSError as error:
        raise PermissionError(
            f"output_dir {folder} cannot be written ({error.strerror}): choose another folder, "
            "or make this one writable"
        ) from error
    probe.unlink()


def free_bytes(folder: Path) -> int:
    """Return how many bytes this user may still write on the disk of `folder`."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Write a file so that after a crash the old content is there, or all of the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep processes apart while they look at a lock and take it over. It ends with the process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no such locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class RunLock:
    """One run per folder. Use it as a context around everything that writes there.

    The lock is a file that names its owner: host, boot, process and that process's start. A lock whose
    owner is gone from this machine is taken over; one of another machine only after `STALE_SECONDS`
    without a heartbeat.

    Raises:
        BlockingIOError: another run holds the folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_NAME
        self.owner = json.dumps(_identity(os.getpid()))
        self._stop = threading.Event()

    def __enter__(self) -> RunLock:
        """Take the lock."""
        with _one_at_a_time(self.path.parent):
            while not self._create():
                self._remove_if_stale()
        threading.Thread(target=self._beat, name="tokenkit-lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back, if it is still ours."""
        self._stop.set()
        if self._read() == self.owner:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Put a complete lock file in place, or return False if there is one."""
        draft = self.path.with_name(f"{LOCK_NAME}-{secrets.token_hex(8)}")
        with draft.open("x", encoding="utf-8") as file:
            file.write(self.owner)
        try:
            os.link(draft, self.path)  # as exclusive as O_EXCL, and never seen half written
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _read(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _remove_if_stale(self) -> None:
        found = self._read()
        if found is None:
            return
        if not _is_stale(found, self._age()):
            raise BlockingIOError(
                f"{self.path.parent} is in use by another run ({found}): wait for it, choose another "
                f"output_dir, or delete {self.path} if you know that run to be gone"
            )
        self.path.unlink(missing_ok=True)

    def _age(self) -> float:
        """Seconds since the last heartbeat, by the clock of the disk."""
        probe = self.path.with_name(f"{LOCK_NAME}-clock-{secrets.token_hex(8)}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            if self._read() == self.owner:
                with contextlib.suppress(OSError):
                    os.utime(self.path, (time.time(), time.time()))


def _is_stale(found: str, age: float) -> bool:
    try:
        owner = json.loads(found)
        here = owner["host"] == socket.gethostname()
        gone = here and _identity(int(owner["pid"])) != owner
    except (ValueError, TypeError, KeyError):
        return age > STALE_SECONDS  # not a lock of ours: its owner cannot be asked
    return gone if here else age > STALE_SECONDS


def _identity(pid: int) -> dict[str, Any]:
    """Name a process of this machine so that no later process can have the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # the name of the program may hold spaces and brackets; the start time is field 22
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        boot, started = "", "" if _is_alive(pid) else "gone"
    return {"host": socket.gethostname(), "boot": boot, "pid": pid, "started": started}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
