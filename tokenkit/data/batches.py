"""The batches of a run: which documents each rank sees at each step, tokenized ahead of time.

Step k trains on documents k * batch_size to (k + 1) * batch_size of the mix. A rank takes its
contiguous share and gradient accumulation splits that further, so neither the number of ranks nor of
micro-batches changes which documents a step sees. What has been read ahead does not count as consumed.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from tokenkit.errors import StuckError, blaming_data
from tokenkit.structs import Batch

_LOOK_SECONDS = 0.2  # between two looks at whether somebody wants the run to stop
_LEAVE_SECONDS = 1.0  # that the end of a run waits for its thread


class Documents(Protocol):
    """A `mix.Mix`, or what gives out rows in its place."""

    @property
    def reading(self) -> str:
        """Where it is, for people."""

    def take(self, count: int) -> Sequence[Any]:
        """Return the next ones."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state behind the last one given out; JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


class Collator(Protocol):
    """A `collate.AlignedCollator`, or what makes a batch of other rows."""

    @property
    def skipped(self) -> Counter[str]:
        """Rows left out so far, by reason."""

    @property
    def altered(self) -> Counter[str]:
        """Characters that were dropped or replaced so far."""

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Return the batch of some rows."""


class _Step(NamedTuple):
    micro_batches: list[Batch]
    state: dict[str, Any]
    """Of the mix, behind the last document of the step."""
    untokenized: Counter[str]
    """Rows that this rank could not tokenize so far."""


class LeftOut(NamedTuple):
    """What of the data was left out or changed, up to the last step given out."""

    skipped: Counter[str]
    """Rows that were no documents, by reason; the same on all ranks."""
    untokenized: Counter[str]
    """Documents that could not be tokenized, by reason."""
    altered: Counter[str]
    """Characters that were dropped or replaced, and in how many rows, those read ahead too."""

    @property
    def rows(self) -> Counter[str]:
        """All that is not trained on, by reason."""
        return self.skipped + self.untokenized


class Batches:
    """An endless iterator over steps, each the list of this rank's micro-batches.

    A rank whose share has no trained token contributes nothing; whether the whole step has one is known after
    the reduction of its counts.

    Args:
        mix: the documents; only this object may read it from now on.
        collator: turns documents into a batch.
        batch_size: documents of one step, over all ranks and micro-batches.
        accumulation: micro-batches of one rank and step.
        rank: this process's number.
        world: number of processes that share the documents of a step.
        prefetch: steps that are tokenized ahead, in a background thread that reads all.
        size_of: of a document: this rank's are put in this order before they are cut into micro-batches.

    Raises:
        ValueError: if the documents of a step do not divide evenly.
    """

    def __init__(
        self,
        mix: Documents,
        collator: Collator,
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 1,
        size_of: Callable[[Any], int] | None = None,
    ) -> None:
        if batch_size < 1 or accumulation < 1 or batch_size % (world * accumulation):
            raise ValueError(
                f"batch_size ({batch_size}) must be a positive multiple of the number of data-parallel "
                f"processes ({world}) times gradient_accumulation_steps ({accumulation})"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}): got {rank}")
        self._mix, self._collator = mix, collator
        self._batch_size, self._accumulation = batch_size, accumulation
        self._rank, self._world = rank, world
        self._prefetch, self._size_of = prefetch, size_of
        self._consumed = mix.state_dict()
        self._untokenized = Counter(collator.skipped)
        self._pending: deque[Future[_Step]] = deque()
        self._reader: _Reader | None = None
        self._is_ahead = False
        """The thread is gone, and the mix stands behind what it read."""

    def __iter__(self) -> Iterator[list[Batch]]:
        """Return itself: steps never end."""
        return self

    def __next__(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step.

        Raises:
            ValueError: if the data cannot go on.
        """
        self._read_ahead()
        step = self._pending.popleft().result()
        self._consumed, self._untokenized = step.state, step.untokenized
        return step.micro_batches

    def ready(self, seconds: float, stop: Callable[[], object] = lambda: False) -> bool:
        """Wait until the next step can be had; False: `stop` said so before.

        Raises:
            StuckError: nothing came for so many seconds.
        """
        self._read_ahead()
        waited, looked = 0.0, time.monotonic()
        while not wait([self._pending[0]], timeout=_LOOK_SECONDS).done:
            if stop():
                return False
            before, looked = looked, time.monotonic()
            waited += min(looked - before, 2 * _LOOK_SECONDS)  # a process that was suspended did not wait
            if waited > seconds:
                raise StuckError(
                    f"rank {self._rank} (host {socket.gethostname()}, process {os.getpid()}) has waited "
                    f"{seconds:g} s for data (hang_timeout), and reads {self._mix.reading}: look at the disk "
                    "or network that it comes from, then go on with --resume"
                )
        return True

    def _read_ahead(self) -> None:
        if self._reader is None:
            if self._is_ahead:
                self._go_back(self._consumed, self._untokenized)
            self._reader = _Reader()
        while len(self._pending) <= self._prefetch:
            self._pending.append(self._reader.submit(self._read_step))

    def _read_step(self) -> _Step:
        share = self._batch_size // self._world
        size = share // self._accumulation
        with blaming_data():
            documents = self._mix.take(self._batch_size)
            mine = documents[self._rank * share : (self._rank + 1) * share]
            if self._size_of is not None:
                mine = sorted(mine, key=self._size_of)
            batches = [self._collator.collate(mine[start : start + size]) for start in range(0, share, size)]
        return _Step(batches, self._mix.state_dict(), Counter(self._collator.skipped))

    def left_out(self) -> LeftOut:
        """Return what this rank left out."""
        skipped = sum((Counter(source["skipped"]) for source in self._consumed["sources"]), Counter[str]())
        return LeftOut(skipped, Counter(self._untokenized), Counter(self._collator.altered))

    def state_dict(self) -> dict[str, Any]:
        """Return the state behind the last step given out; JSON, and the same on all ranks."""
        return self._consumed

    def load_state_dict(self, state: Mapping[str, Any], untokenized: Mapping[str, int] | None = None) -> None:
        """Continue where `state_dict` was taken; `Mix.load_state_dict` says what it raises.

        Args:
            state: what `state_dict` returned.
            untokenized: what this rank shall have counted so far.
        """
        self._stop_reading()
        self._go_back(state, untokenized or {})
        self._consumed = self._mix.state_dict()

    def close(self) -> None:
        """Stop the background thread; what it has read ahead is read again if the steps go on."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._is_ahead = self._stop_reading(_LEAVE_SECONDS)  # else it hangs, and has the mix

    def _go_back(self, state: Mapping[str, Any], untokenized: Mapping[str, int]) -> None:
        self._mix.load_state_dict(state)
        self._is_ahead = False
        self._untokenized = Counter(untokenized)
        self._collator.skipped.clear()
        self._collator.skipped.update(untokenized)

    def _stop_reading(self, seconds: float | None = None) -> bool:
        """Return whether the thread let go of the mix; None: wait until it does."""
        for future in self._pending:
            future.cancel()
        left = wait(self._pending, timeout=seconds).not_done
        self._pending.clear()
        return not left


class _Reader:
    """A thread that does one job after another: steps must be read in order.

    Unlike that of a pool it is no reason for a process not to end, whatever it hangs in.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[_Step], Callable[[], _Step]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="tokenkit-data", daemon=True).start()

    def submit(self, job: Callable[[], _Step]) -> Future[_Step]:
        future: Future[_Step] = Future()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # of whoever asks for the result
                    future.set_exception(error)
