"""Where the time of a step goes, without a wait of the host: wall time on a CPU, events on a GPU.

    clock.begin(device)   ...   clock.mark("teacher")   ...   clock.mark("student")

What a GPU was asked to do is over some time later. Its events are read once it has passed them, so the last
part of a step is known in the next one.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict, deque
from typing import Any

import torch

GIB = 2**30


class Clock:
    """Seconds by part of a step, since they were last taken."""

    def __init__(self) -> None:
        """Nothing was measured."""
        self._device = torch.device("cpu")
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps = 0
        self._last: Any = None
        self._open: deque[tuple[str, Any, Any]] = deque()
        """Parts whose end the device has not passed yet."""

    def begin(self, device: torch.device) -> None:
        """Begin a step."""
        self._device = device
        self._steps += 1
        self._last = self._now()

    def mark(self, part: str) -> None:
        """Say that what was done since the last mark is `part`."""
        now = self._now()
        self._open.append((part, self._last, now))
        self._last = now

    def add(self, part: str, seconds: float) -> None:
        """Add what the host did outside of steps."""
        self._seconds[part] += seconds

    def take(self) -> dict[str, float]:
        """Return the mean seconds of a step by part since the last call, of what the device has passed."""
        while self._open and self._is_passed(self._open[0][2]):
            part, begin, end = self._open.popleft()
            self._seconds[part] += self._between(begin, end)
        found = {part: seconds / max(1, self._steps) for part, seconds in self._seconds.items()}
        self._seconds.clear()
        self._steps = 0
        return found

    def peak_memory(self) -> float | None:
        """Return the GiB that this process has held at most, of the GPU if it uses one; None: not known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_passed(self, moment: Any) -> bool:
        return isinstance(moment, float) or bool(moment.query())

    def _between(self, begin: Any, end: Any) -> float:
        return end - begin if isinstance(end, float) else float(begin.elapsed_time(end)) / 1000
