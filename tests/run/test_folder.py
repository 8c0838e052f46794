"""One run per folder, nothing overwritten, nothing torn."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.faults.registry import fault
from tokenkit import disk as file_locks
from tokenkit.disk import free_bytes, write_durably
from tokenkit.run import folder as run_folder
from tokenkit.run.folder import RunLock, prepare_output


def test_a_new_folder_is_made_and_an_empty_one_taken(tmp_path):
    prepare_output(tmp_path / "a/b", resume=False)
    prepare_output(tmp_path / "a/b", resume=False)
    assert os.listdir(tmp_path / "a/b") == []
    assert (tmp_path / "a/b").stat().st_mode & 0o007 == 0


def test_a_folder_that_holds_something_is_refused_unless_the_run_resumes(tmp_path):
    (tmp_path / "precious").write_text("thesis")
    with pytest.raises(FileExistsError, match=r"holds precious: pass --resume .* or choose another folder"):
        prepare_output(tmp_path, resume=False)
    prepare_output(tmp_path, resume=True)
    assert (tmp_path / "precious").read_text() == "thesis"


def test_a_folder_of_a_run_that_died_at_once_is_still_empty(tmp_path):
    (tmp_path / ".lock").write_text("{}")
    prepare_output(tmp_path, resume=False)


def test_after_a_run_that_could_not_begin_the_folder_is_free(tmp_path):
    (tmp_path / "outcome.json").write_text("{}")
    prepare_output(tmp_path, resume=False)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FileExistsError, match=r"holds metrics.jsonl, outcome.json"):
        prepare_output(tmp_path, resume=False)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        prepare_output(tmp_path / "file", resume=False)


@fault(
    "The output folder is read-only",
    "refused before anything is loaded",
    code=65,
    kept="nothing is begun",
)
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_folder.Path, "touch", refuse)
    with pytest.raises(PermissionError, match=r"cannot be written .Read-only file system"):
        prepare_output(tmp_path, resume=False)


def test_durable_writes_replace_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, "old")
    write_durably(path, "new")
    assert path.read_text() == "new"

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, "newer")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_free_bytes_are_those_of_the_disk(tmp_path):
    assert 0 < free_bytes(tmp_path) < 2**60


def test_the_second_run_is_told_who_holds_the_folder_and_the_third_may_start(tmp_path):
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(BlockingIOError, match=rf'in use by another run .*"pid": {os.getpid()}'):
            RunLock(tmp_path).__enter__()
    assert os.listdir(tmp_path) == []
    with RunLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time, pathlib; from tokenkit.run.folder import RunLock;"
        f"RunLock(pathlib.Path({str(tmp_path)!r})).__enter__(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.getcwd()) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            RunLock(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def write_lock(folder, **changes):
    """Leave the lock of a run that is gone: nobody has the kernel's lock on it."""
    (folder / ".lock").write_text(json.dumps(run_folder.identity() | changes))


@pytest.mark.parametrize(
    "changes",
    [{"pid": os.getpid()}, {"pid": 1}, {"pid": 10**30}, {"pid": "?"}, {"host": "another container's name"}],
)
def test_who_is_gone_from_this_machine_holds_nothing_whatever_the_file_says(changes, tmp_path):
    write_lock(tmp_path, **changes)
    with RunLock(tmp_path) as lock:
        assert lock.is_held()
    assert os.listdir(tmp_path) == []


def test_the_lock_of_another_machine_holds_while_its_heart_beats(tmp_path):
    write_lock(tmp_path, boot="another")
    with pytest.raises(BlockingIOError, match=r"delete .*\.lock if you know that run to be gone"):
        RunLock(tmp_path).__enter__()
    old = time.time() - run_folder.STALE_SECONDS - 5
    os.utime(tmp_path / ".lock", (old, old))
    with RunLock(tmp_path):
        pass


def test_on_a_disk_without_locks_the_heartbeat_decides(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(file_locks.fcntl, "flock", refuse)
    with RunLock(tmp_path):
        with pytest.raises(BlockingIOError, match="in use by another run"):
            RunLock(tmp_path).__enter__()
        old = time.time() - run_folder.STALE_SECONDS - 5
        os.utime(tmp_path / ".lock", (old, old))
        RunLock(tmp_path).__enter__()


@pytest.mark.parametrize("text", ["?", "[" * 100_000, "{}", '{"boot": {}}'])
def test_a_lock_that_cannot_be_read_holds_until_it_is_old(text, tmp_path):
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(BlockingIOError):
        RunLock(tmp_path).__enter__()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 5
        while (tmp_path / ".lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / ".lock").stat().st_mtime > 0


def test_a_lock_that_was_taken_from_us_is_not_deleted_by_us(tmp_path):
    with RunLock(tmp_path):
        write_lock(tmp_path, pid=1)
    assert (tmp_path / ".lock").exists()


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path):
    for _ in range(20):
        write_lock(tmp_path, pid=1)
        taken, start = [], threading.Barrier(4)

        def contend(taken=taken, start=start):
            lock = RunLock(tmp_path)
            start.wait()
            try:
                lock.__enter__()
            except BlockingIOError:
                return
            taken.append(lock)

        threads = [threading.Thread(target=contend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        taken[0].__exit__(None, None, None)
        assert os.listdir(tmp_path) == []
