"""From loss terms to the scalar that is differentiated: Σ_j weight_j(step) · total_j / count_j.

`total_j` is what one micro-batch on one rank adds up; `count_j` is the number of things that the whole
optimizer step adds up, over all ranks and micro-batches. So neither padding, accumulation nor the number
of ranks moves the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenkit.structs import LossTerm

Schedule = Callable[[int], float]

SCHEDULES = ("constant", "linear", "cosine", "reverse_cosine")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


class Objective:
    """The weighted sum of the losses, and how the weights move over the run.

    Args:
        names: the losses, as the user named them.
        weights: one static weight per loss, or a mapping from name to weight (1 where absent).
        schedules: one schedule per loss, or a mapping; it multiplies the static weight.
        total_steps: length of the run, over which the bare schedule names stretch.

    Raises:
        ValueError: a weight or schedule for an unknown loss, wrong lengths, a schedule that cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] | Mapping[str, float] | None,
        schedules: Sequence[str] | Mapping[str, str] | None,
        total_steps: int,
    ):
        self.names = list(names)
        static = _per_loss("loss_weights", weights, self.names, 1.0)
        moving = _per_loss("loss_schedules", schedules, self.names, "constant")
        self._weights = {name: float(static[name]) for name in self.names}
        self._schedules = {name: parse_schedule(str(moving[name]), total_steps) for name in self.names}

    def weights(self, step: int) -> dict[str, float]:
        """Return the weight of each loss at `step` (from 0)."""
        return {name: self._weights[name] * self._schedules[name](step) for name in self.names}

    def combine(
        self, terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, Tensor]:
        """Return (scalar to differentiate, [losses] their values before weighting, detached).

        Args:
            terms: what this micro-batch on this rank adds up, by loss.
            counts: what the whole optimizer step adds up, by loss. A count of 0 makes the loss 0.
            step: the optimizer step, for the schedules.
        """
        weights = self.weights(step)
        means = torch.stack([_mean(terms[name].total, counts[name]) for name in self.names])
        weight_J = torch.tensor([weights[name] for name in self.names], device=means.device)
        return (means * weight_J).sum(), means.detach()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Divide; where a loss comes in several parts (chunk sizes), it is the mean of their quotients."""
    return (total / count.clamp_min(1).to(total.dtype)).mean()


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


def _per_loss(field: str, given: object, names: list[str], default: Any) -> dict[str, Any]:
    if given is None or (isinstance(given, Sequence) and not given):
        return dict.fromkeys(names, default)
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"{field} names {unknown}, but the losses of this run are {names}")
        return {name: given.get(name, default) for name in names}
    assert isinstance(given, Sequence)
    if len(given) != len(names):
        raise ValueError(f"{field} must give one value per loss {names}, got {list(given)}")
    return dict(zip(names, given, strict=True))
