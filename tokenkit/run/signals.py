"""Signals as a wish to stop: heard between two steps, save, then exit with 75.

SIGTERM SIGHUP SIGUSR1 SIGINT   while training: the step is finished and saved
                                while loading or exporting: what is at work ends at once
SIGINT again                    ends at once, whatever is at work
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from tokenkit.errors import StoppedError

_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has two
SAME_SECONDS = 1.0  # a terminal and torchrun both pass one Ctrl-C on: what comes so soon is the same


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
