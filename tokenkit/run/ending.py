"""How a run ends: one `outcome.json`, whichever rank failed, and a name for whoever is silent.

    rank fails by itself         writes its code and its words
    rank sees another's end      waits for those words, and ends with that code
                                 none come: says who is gone or silent, and where
    rank is silent for so long   the others say so and leave

Each rank of several has a file `.lock-rank-N` in the output folder: a heartbeat, and what the rank is at. The
rank holds the kernel's lock on it, so that one that is gone is told from one that does nothing.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenkit.disk import NO_LINK, lock, write_durably
from tokenkit.errors import DiskError, ExitCode, OtherRankError, SilenceError, exit_code
from tokenkit.run.folder import LOCK_NAME, OUTCOME_NAME, identity, one_at_a_time
from tokenkit.run.redaction import complain, redact

if TYPE_CHECKING:
    from tokenkit.parallel import World

GONE = "is gone"
_SILENT = "has been silent for"
_WORDS_SECONDS = 3.0  # the rank that failed writes its words before it leaves: they come at once
_SOURCE = re.compile(r"^\[[^\]\s]*:\d+\]\s*")
_COMMUNICATION = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
RUNNING = "running"
_OUTCOME_BYTES = 4096  # more than any outcome: a full disk lets a file be written over, not grow
_LONGEST_REASON = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    code: ExitCode
    """What the process exits with."""
    reason: str
    """One sentence; secrets in it are blacked out."""
    step: int = 0
    """Optimizer steps done."""
    rank: int | None = 0
    """Who says so; None: a rank that saw another end, and knows no cause."""
    word: str = ""
    """Instead of the code's name."""


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Say in `outcome.json` how a run ended: torchrun loses the exit codes of its workers.

    Where the disk is full, the file that said that the run goes on is written over in its place.
    """
    path, text = folder / OUTCOME_NAME, _said(outcome, _LONGEST_REASON)
    try:
        write_durably(path, text.ljust(_OUTCOME_BYTES) if outcome.word == RUNNING else text)
    except DiskError:
        if path.is_symlink() or not path.is_file() or path.stat().st_size < _OUTCOME_BYTES:
            raise
        with path.open("r+", encoding="ascii") as file:
            file.write(_said(outcome, _LONGEST_REASON // 6).ljust(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())


def _said(outcome: Outcome, longest: int) -> str:
    said = {
        "code": int(outcome.code),
        "outcome": outcome.word or outcome.code.name.lower(),
        "reason": redact(outcome.reason, longest),
        "step": outcome.step,
        "rank": outcome.rank,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(said, indent=1) + "\n"


def read_outcome(folder: Path) -> dict[str, Any]:
    """Return what `outcome.json` says; empty where it says nothing."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / OUTCOME_NAME).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


@dataclass
class Ending:
    """What a run says of itself while it goes on, on one rank."""

    folder: Path
    world: World
    seconds: float
    """A rank that is silent for longer is taken for dead."""
    step: int = 0
    """Optimizer steps done."""
    doing: str = "loading"
    """What this rank is at."""
    since: float = 0.0
    """When that began, by this process's clock."""
    code: ExitCode = ExitCode.DONE
    reason: str = ""
    beats: _Beats | None = None
    """Where there are several ranks."""

    def at(self, doing: str) -> None:
        """Say what comes next."""
        self.doing, self.since = doing, time.monotonic()
        if self.beats is not None:
            self.beats.beat()


def begin_outcome(folder: Path) -> None:
    """Write over what an earlier run said, before this one can be killed; sweep the files of its ranks."""
    for path in folder.glob(f"{LOCK_NAME}-rank-*"):
        path.unlink(missing_ok=True)
    reason = "the run goes on; where no process of it is left, it was killed: go on with --resume"
    write_outcome(folder, Outcome(ExitCode.FAULT, reason, word=RUNNING))


@contextmanager
def ending(folder: Path, world: World, seconds: float) -> Iterator[Ending]:
    """Say in `outcome.json` how the block ends. Every rank enters it, the folder being there.

    Raises:
        OtherRankError: in place of an error that only says that another rank has ended.
        SilenceError: in place of one that says that another rank is gone, or does nothing.
    """
    state = Ending(folder, world, seconds, since=time.monotonic())
    beats = state.beats = _Beats(state) if world.mesh is not None else None
    try:
        yield state
    except BaseException as error:
        ends_with = error
        if beats is not None and _is_of_another(error):
            ends_with = _cause(error, state, beats)
        _record(state, ends_with)
        if ends_with is error:
            raise
        raise ends_with from error
    finally:
        if beats is not None:
            beats.stop()
    if world.is_main:
        write_outcome(folder, Outcome(state.code, state.reason, state.step))


def _is_of_another(error: BaseException) -> bool:
    if isinstance(error, OtherRankError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _COMMUNICATION)


def _cause(error: BaseException, state: Ending, beats: _Beats) -> BaseException:
    """Return the error of the rank that failed first, or one that says which rank is gone."""
    state.at("left, as another rank did not answer")
    deadline = time.monotonic() + _WORDS_SECONDS
    while time.monotonic() < deadline:
        said = read_outcome(state.folder)
        if said.get("outcome") != RUNNING and said.get("rank") not in (None, state.world.rank):
            other = OtherRankError(f"rank {said['rank']} failed first: {said.get('reason')}", said["rank"])
            other.exit_code = int(said.get("code", OtherRankError.exit_code))
            return other
        if any(GONE in words for words in beats.silent()):
            break  # without a word
        time.sleep(0.05)
    if isinstance(error, OtherRankError):
        return error
    silent = beats.silent()
    if not silent:
        return SilenceError(
            f"a process of the run did not answer, and none is seen to be gone: {_first_line(error)}; start "
            "again with --resume"
        )
    return SilenceError(f"{'; '.join(silent)}: {_first_line(error)}; start again with --resume")


def _first_line(error: BaseException) -> str:
    """Return what a library of communication says, without the place in its source that says it."""
    line = _SOURCE.sub("", str(error).strip().partition("\n")[0])
    return line if len(line) <= 120 else f"{line[:117].rstrip()}..."


def _record(state: Ending, error: BaseException) -> None:
    """Write the outcome, unless one that says more is there. Never raises: the error itself goes on."""
    knows = getattr(error, "is_own", not isinstance(error, SilenceError | OtherRankError))
    mine = Outcome(
        ExitCode(exit_code(error)),
        f"{type(error).__name__}: {error}",
        state.step,
        state.world.rank if knows else None,
    )
    try:
        with one_at_a_time(state.folder):
            there = read_outcome(state.folder)
            if not there or there.get("outcome") == RUNNING or (there.get("rank") is None and knows):
                write_outcome(state.folder, mine)
    except OSError as trouble:
        line = f"tokenkit: {state.folder / 'outcome.json'} could not be written ({trouble})"
        complain(f"{line}; it would have said: {mine.code.name.lower()}, {mine.reason}")


class _Beats:
    """The heartbeats of the ranks. A thread writes this rank's and looks at the others'."""

    def __init__(self, state: Ending):
        self.state = state
        self.every = min(10.0, state.seconds / 8)
        self.path = self._path(state.world.rank)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o640)
        self._me = identity()
        self._done = threading.Event()
        with suppress(OSError):  # some disks have no locks
            lock(self._file)
        self.beat()
        self._thread = threading.Thread(target=self._watch, name="tokenkit-ranks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave: this rank is watched no longer."""
        self._done.set()
        self._thread.join(timeout=5)
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        if not self._thread.is_alive():  # it would write to whatever has this number next
            os.close(self._file)

    def beat(self) -> None:
        """Say that this rank lives, and what it is at."""
        text = json.dumps({**self._me, "step": self.state.step, "doing": self.state.doing})
        with suppress(OSError):
            os.pwrite(self._file, text.encode().ljust(1000), 0)

    def silent(self) -> list[str]:
        """Name the ranks that are gone or stopped; where none is, those that did not leave as this one."""
        told = [(rank, *self._look(rank)) for rank in range(self.state.world.world_size)]
        others = [(rank, about, how) for rank, about, how in told if rank != self.state.world.rank]
        bad = [f"{_name(rank, about)} {how}" for rank, about, how in others if how]
        return bad or [
            f"{_name(rank, about)} has not come on for {self.state.seconds:g} s (hang_timeout)"
            for rank, about, _ in others
            if about and not str(about.get("doing")).startswith("left")
        ]

    def _path(self, rank: int) -> Path:
        return self.state.folder / f"{LOCK_NAME}-rank-{rank:05d}"

    def _look(self, rank: int) -> tuple[dict[str, Any], str]:
        """Return what a rank says of itself, and what is wrong with it; "" where nothing is."""
        try:
            file = os.open(self._path(rank), os.O_RDWR | NO_LINK)
        except OSError:
            return {}, ""  # not begun, or ended
        try:
            about = json.loads(os.pread(file, 1000, 0))
            age = os.fstat(self._file).st_mtime - os.fstat(file).st_mtime  # both by the clock of the disk
            if about["boot"] == self._me["boot"] and rank != self.state.world.rank and _is_free(file):
                return about, f"{GONE}: it was killed, ran out of memory or crashed"
            return (
                about,
                f"{_SILENT} {age:.0f} s (hang_timeout)" if age > self.state.seconds else "",
            )
        except (OSError, ValueError, KeyError, TypeError):
            return {}, ""
        finally:
            os.close(file)

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            self.beat()
            stopped, state = self._stopped(), self.state
            is_stuck = state.doing.startswith("step") and time.monotonic() - state.since > 1.5 * state.seconds
            if (stopped or is_stuck) and not self._done.is_set():
                self._leave(stopped)

    def _stopped(self) -> list[str]:
        """Name the ranks that are silent.

        Each rank looks at the next one, and at what others found: files opened are linear in the ranks.
        """
        world = self.state.world
        if _SILENT in self._look((world.rank + 1) % world.world_size)[1]:
            return [words for words in self.silent() if _SILENT in words]
        said = read_outcome(self.state.folder)
        kind, _, words = str(said.get("reason")).partition(": ")
        is_theirs = kind == SilenceError.__name__ and said.get("rank") is None
        if not is_theirs or self.state.doing.startswith("left"):
            return []
        return [words.partition(": this rank waited")[0].removesuffix("; start again with --resume")]

    def _leave(self, stopped: list[str]) -> NoReturn:
        """End this process: its main thread hangs, or waits in a collective, where no error reaches it."""
        state = self.state
        rank, waited = state.world.rank, f"this rank waited at {state.doing}; start again with --resume"
        others = [self._look(other)[0] for other in range(state.world.world_size) if other != rank]
        is_own = not stopped and any(str(about.get("doing")).startswith("left") for about in others)
        if stopped:
            words = f"{'; '.join(stopped)}: {waited}"
        elif is_own:
            me = _name(rank, {**self._me, "step": state.step, "doing": state.doing})
            words = f"{me} has not come on for {state.seconds:g} s (hang_timeout), the others waited"
        else:
            words = f"no rank came on for {1.5 * state.seconds:g} s (hang_timeout): {waited}"
        error = SilenceError(words)
        error.is_own = is_own
        complain(f"tokenkit: rank {rank}: {error}")
        _record(state, error)
        os._exit(exit_code(error))


def _name(rank: int, about: dict[str, Any]) -> str:
    if not about:
        return f"rank {rank}"
    where = f"host {about.get('host')}, process {about.get('pid')}"
    return f"rank {rank} ({where}, after step {about.get('step')}, {about.get('doing')})"


def _is_free(file: int) -> bool:
    """Whether nobody holds the kernel's lock on a file: its owner is gone. Where there are no locks, no."""
    try:
        lock(file)
    except OSError:
        return False
    return True
