"""What every training does around its steps: takes its folder, goes on, stops, saves, says how it ended.

    with processes(...) as (world, stop):                signals, and the other ranks
        with taken(..., world, stop) as session:         the folder's lock, outcome.json
            session.restore(...)                         the newest checkpoint, if asked to; config.yaml
            with reports, session.taking_steps(...):
                for _ in session.steps(total):           until all are taken, or a signal came
                    ...                                  a step; session.save(...) where one is due

A signal is a wish to stop, heard between two steps; what it stopped was saved, and exits with 75:

    SIGTERM SIGHUP SIGUSR1 SIGINT   while training: the step is finished and saved
                                    while loading or exporting: what is at work ends at once
    SIGINT again                    ends at once, whatever is at work
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from tokenkit.config import to_yaml
from tokenkit.disk import write_durably
from tokenkit.errors import DiskError, ExitCode, StoppedError
from tokenkit.parallel import World, joined
from tokenkit.run import checkpoint
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.ending import Ending, begin_outcome, ending
from tokenkit.run.folder import RunLock, owned
from tokenkit.run.saving import FEWEST, Background

_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has two
SAME_SECONDS = 1.0  # a terminal and torchrun both pass one Ctrl-C on: what comes so soon is the same


@dataclass(frozen=True, slots=True)
class Saving:
    """How a run writes its checkpoints."""

    keep_last: int = FEWEST
    """Checkpoints that are kept; see `saving.write`."""
    is_async: bool = False
    """They are written while the next steps are taken."""


class StopRequest:
    """Raises `asked` when a signal comes, or `StoppedError` where nobody would look at it.

    As a context it listens, if this is the thread that may. A signal that whoever started the process
    wants ignored (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        """The first signal that came while `waiting_for_step`."""
        self._asked_at = 0.0
        self._lost: str | None = "no step was taken"
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        """Listen."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back that were there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting_for_step(self, after: str) -> Iterator[None]:
        """Within the block a signal waits for the end of a step.

        Args:
            after: what a signal that comes behind the block breaks off, for its message.
        """
        self._lost = None
        try:
            yield
        finally:
            self._lost = after

    def raise_if_asked(self) -> None:
        """Say behind the block what came in it, after it was last looked at.

        Raises:
            StoppedError: a signal did.
        """
        if self.asked is not None:
            raise StoppedError(f"stopped by {self.asked}: {self._lost}")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.asked is None:
            self.asked, self._asked_at = name, now
            if self._lost is not None:
                raise StoppedError(f"stopped by {name}: {self._lost}")
        elif number == signal.SIGINT and now - self._asked_at > SAME_SECONDS:
            raise KeyboardInterrupt("interrupted again: nothing was saved since the last checkpoint")


@contextmanager
def processes(**options: Any) -> Iterator[tuple[World, StopRequest]]:
    """Hear signals, and be one of the run's processes; `options` are those of `parallel.start`."""
    with StopRequest() as stop_request, joined(**options) as world:
        yield world, stop_request


@dataclass(kw_only=True)
class Session:
    """One process's view of a run that has begun."""

    folder: Path
    config: Any
    """As it stands in config.yaml."""
    resume: bool
    world: World
    stop: StopRequest
    lock: RunLock | None
    """That of the folder, which rank 0 holds."""
    ending: Ending
    """Its `step` counts the steps that are done."""
    saving: Saving = Saving()
    background: Background | None = None
    """Where checkpoints are written while the next steps are taken."""
    is_resumed: bool = False
    """It goes on from a checkpoint."""
    save_seconds: float = 0.0
    """That training has stood still for checkpoints since somebody set this to 0."""
    _is_saved: bool = field(default=False, init=False)
    _then: Callable[[], None] | None = field(default=None, init=False)
    state: State = field(init=False)
    identity: Identity = field(init=False)

    def restore(self, state: State, identity: Identity, may_differ: Collection[str]) -> Path | None:
        """Load the newest checkpoint into `state`, and return its folder; None: it begins.

        Raises:
            CheckpointError, ValueError: it cannot be read, or is of another configuration.
        """
        self.state, self.identity, found = state, identity, None
        if self.resume:
            root = self.folder / "checkpoints"
            found = checkpoint.restore(root, state, self.identity, self.world, may_differ=may_differ)
        if found is not None:
            self.is_resumed, self.ending.step = True, state.step
            self.world.say(f"resuming after step {state.step} from {found}")
        if self.world.is_main and not (self.folder / "config.yaml").exists():
            write_durably(self.folder / "config.yaml", to_yaml(self.config))
        return found

    def steps(self, total: int, is_ready: Callable[[], bool] = lambda: True) -> Iterator[int]:
        """Yield the number of each step that is left, from 1, until a signal came to some rank.

        Whoever takes the step counts it in `ending.step`.

        Args:
            total: the number of the last one.
            is_ready: waits for the data of the next step; False: a signal came meanwhile.

        Raises:
            CheckpointError: one that was written meanwhile could not be, on some rank.
        """
        while (step := self.ending.step + 1) <= total:
            self.at(f"waiting for the data of step {step}")
            came = not is_ready() or self.stop.asked is not None
            self.at(f"step {step}")
            if self._agree(came):
                return
            yield step

    def _agree(self, came: bool) -> bool:
        """Tell the ranks how things stand between two steps; return whether a signal came to some rank."""
        if (background := self.background) is None or not background.is_busy:
            return self.any_rank(came)
        flags = {"stop": came, "failed": background.has_failed, "written": background.is_written}
        if self.world.mesh is None:
            added = {name: float(flag) for name, flag in flags.items()}
        else:
            tensors = {name: torch.tensor(float(flag)) for name, flag in flags.items()}
            added = {k: float(v) for k, v in self.world.all_reduce(tensors, self.ending.step).items()}
        if added["failed"] or added["written"] == self.world.world_size:
            self.settle()
        return added["stop"] > 0

    def settle(self) -> None:
        """Wait until the last checkpoint is committed; every rank calls it.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.background is not None and self.background.is_busy:
            self.at("saving")
            began = time.monotonic()
            try:
                self.background.finish()
            finally:
                self.save_seconds += time.monotonic() - began
        then, self._then = self._then, None
        if then is not None:
            then()

    @contextmanager
    def taking_steps(self, after: str) -> Iterator[None]:
        """Let signals wait for the end of a step in the block; say behind it what no rank looked at.

        Behind the block the last checkpoint is committed.

        Args:
            after: what a signal that comes behind the block breaks off, for its message.

        Raises:
            StoppedError: a signal came while the ranks asked each other, and `stopped` was not called.
            CheckpointError: see `settle`.
        """
        with self.stop.waiting_for_step(after):
            yield
            self.settle()
        if not self._is_saved:
            self.stop.raise_if_asked()

    def at(self, doing: str) -> None:
        """Say what this rank is at: the others name it where it hangs."""
        self.ending.at(doing)

    def is_stopped(self) -> bool:
        """Whether a signal came to some rank; every rank asks."""
        return self.any_rank(self.stop.asked is not None)

    def stopped(self) -> tuple[ExitCode, str]:
        """Say that all is saved, once it is, and return how the run ends.

        Raises:
            CheckpointError: see `settle`.
        """
        self.settle()
        self._is_saved = True
        name = self.stop.asked or "a signal to another rank"
        words = f"stopped by {name} after step {self.ending.step}: go on with --resume"
        self.world.say(words)
        return ExitCode.PREEMPTED, words

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on some rank: a signal may reach only one."""
        if self.world.mesh is None:
            return flag
        flags = {"flag": torch.tensor(float(flag))}
        return float(self.world.all_reduce(flags, self.ending.step)["flag"]) > 0

    def save(self, extra: Mapping[str, Any], then: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint, unless that of this step is there; or begin to, where `saving` says so.

        Args:
            extra: JSON, what the run goes on from beside its tensors.
            then: called once it is committed, on every rank.

        Raises:
            DiskError: the folder is gone, or of another run.
            CheckpointError: it could not be written, or the one before, meanwhile.
        """
        self.settle()
        self.at("saving")
        state, root, began = self.state, self.folder / "checkpoints", time.monotonic()
        if self.lock is not None and not self.lock.is_held():
            raise DiskError(
                f"{self.lock.path} is gone or of another run: the folder was removed or taken while the run "
                "went on, and nothing was written there; choose another output folder, or start again"
            )
        state.step, state.extra, self._then = self.ending.step, extra, then
        if not (root / f"step_{state.step:08d}").exists():
            if self.background is not None:
                self.background.begin(root, state, self.identity, self.saving.keep_last)
            else:
                checkpoint.save(root, state, self.identity, self.world, keep_last=self.saving.keep_last)
        self.save_seconds += time.monotonic() - began
        if self.background is None:
            self.settle()


@contextmanager
def taken(
    folder: Path,
    config: Any,
    world: World,
    stop: StopRequest,
    *,
    resume: bool,
    hang_timeout: float,
    export: Path | None = None,
    saving: Saving = Saving(),
) -> Iterator[Session]:
    """Take the output folder; say in outcome.json how the block ends. Every rank enters it.

    Args:
        folder: empty, or of the run that goes on.
        config: of the run.
        world: its processes.
        stop: listening.
        resume: the run may go on from what is there.
        hang_timeout: seconds; a rank that is silent for longer is taken for dead.
        export: a second folder, written at the end: looked at now.
        saving: how checkpoints are written.

    Raises:
        FileExistsError: a folder holds something else, or a run that goes on.
    """
    lock = None
    with ExitStack() as stack:
        with world.together("prepare the output folder"):
            if world.is_main:
                lock = stack.enter_context(owned(folder, resume=resume))
                if export is not None:
                    _refuse_old_export(export)
                begin_outcome(folder)
        background = Background(world, hang_timeout) if saving.is_async else None
        if background is not None:
            stack.callback(background.leave)  # behind what outcome.json says: another rank may wait for that
        yield Session(
            folder=folder,
            config=config,
            resume=resume,
            world=world,
            stop=stop,
            lock=lock,
            ending=stack.enter_context(ending(folder, world, hang_timeout)),
            saving=saving,
            background=background,
        )


def _refuse_old_export(folder: Path) -> None:
    """Find before training what the export would find behind it."""
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link, and an export is moved to its name: remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} already holds an exported model, and the run would write there at its end: "
            "move it away, or name another folder with export_to"
        )


def check_same(folder: Path, done: Identity, now: Identity, may_differ: Collection[str]) -> None:
    """Refuse to call a run done that another configuration has done.

    Raises:
        ValueError: with each difference.
    """
    if changes := checkpoint.differences(done, now, may_differ):
        raise ValueError(
            f"{folder} holds a finished run of another configuration (then -> now):\n  "
            + "\n  ".join(changes)
            + "\nchoose another output folder"
        )
