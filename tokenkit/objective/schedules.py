"""How a loss' weight moves over the run: a pure function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

Schedule = Callable[[int], float]

SCHEDULES = ("constant", "linear", "cosine", "reverse_cosine")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def parse_schedule(text: str, total_steps: int) -> Schedule:
    """Read a loss schedule.

    `constant(v)`; `linear(a,b,steps)` and `cosine(a,b,steps)` go from a to b and stay there; the bare names
    `constant` (1), `linear` and `cosine` (1 to 0) and `reverse_cosine` (0 to 1) stretch over the whole run.

    Raises:
        ValueError: not one of these.
    """
    bare = text.strip()
    if bare == "constant":
        return lambda step: 1.0
    if bare in ("linear", "cosine"):
        return _ramp(bare, 1.0, 0.0, total_steps)
    if bare == "reverse_cosine":
        return _ramp("cosine", 0.0, 1.0, total_steps)
    match = re.fullmatch(rf"(constant|linear|cosine)\(((?:\s*{_NUMBER}\s*,?)+)\)", bare)
    values = [float(value) for value in re.findall(_NUMBER, match[2])] if match else []
    if match and match[1] == "constant" and len(values) == 1:
        return lambda step: values[0]
    if match and match[1] != "constant" and len(values) == 3 and values[2] >= 1:
        return _ramp(match[1], values[0], values[1], int(values[2]))
    raise ValueError(
        f"loss_schedules: {text!r} is no schedule; expected one of {', '.join(SCHEDULES)}, constant(v), "
        "linear(a,b,steps) or cosine(a,b,steps)"
    )


def _ramp(kind: str, start: float, end: float, steps: int) -> Schedule:
    def value(step: int) -> float:
        progress = min(step / max(steps, 1), 1.0)
        if kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (end - start) * progress

    return value
