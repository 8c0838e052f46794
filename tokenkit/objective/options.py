"""How losses are weighed and joined, as a user says it, and how a weight moves. Nothing here loads torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tokenkit.errors import nearest
from tokenkit.options import Checked, OptionError, check_at_least, check_choices, check_positive, option

Schedule = Callable[[int], float]

SCHEDULES = ("constant", "linear", "cosine", "reverse_cosine")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def parse_schedule(text: str, total_steps: int) -> Schedule:
    """Read a loss schedule.

    `constant(v)`; `linear(a,b,steps)` and `cosine(a,b,steps)` go from a to b and stay there,
    `step(a,b,steps)` is a in so many steps and b in all further ones; the bare names `constant` (1), `linear`
    and `cosine` (1 to 0) and `reverse_cosine` (0 to 1) stretch over the whole run.

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
    match = re.fullmatch(rf"(constant|linear|cosine|step)\(((?:\s*{_NUMBER}\s*,?)+)\)", bare)
    values = [float(value) for value in re.findall(_NUMBER, match[2])] if match else []
    if match and match[1] == "constant" and len(values) == 1:
        return lambda step: values[0]
    if match and match[1] != "constant" and len(values) == 3 and values[2] >= 1:
        return _ramp(match[1], values[0], values[1], int(values[2]))
    raise ValueError(
        f"loss_schedules: {text!r} is no schedule; expected one of {', '.join(SCHEDULES)}, constant(v), "
        "linear(a,b,steps), cosine(a,b,steps) or step(a,b,steps)"
    )


def _ramp(kind: str, start: float, end: float, steps: int) -> Schedule:
    def value(step: int) -> float:
        if kind == "step":
            return start if step < steps else end
        progress = min(step / max(steps, 1), 1.0)
        if kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (end - start) * progress

    return value


WeightMode = Literal["static", "uncertainty", "balance", "ema"]

EXACT = ("gradmag", "gradclip", "pcgrad")
"""They read the gradients of all parameters."""

LAST_LAYER = ("gradnorm", "approx_gradmag", "approx_gradmag_preserve_mag")
"""They read those of the last transformer layer."""

AGGREGATIONS = EXACT + LAST_LAYER


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Checked):
    """Which losses, with which weights and options."""

    weight_mode: WeightMode | None = option(None, "loss_weight_mode")
    """What multiplies loss_weights and schedule. None or static: 1; uncertainty: e^-s, s trained; balance:
    1 / loss; ema: 1 / running mean of the loss."""

    s_init: float | tuple[float, ...] | Mapping[str, float] = option(0.0, "uncertainty_s_init")
    """Start of the log-variances s, with `uncertainty`; one for all, one per loss or a mapping."""

    ema_alpha: float = 0.99
    """Share of the past in the running mean of a loss, with `ema`; in [0, 1)."""

    aggregation: str | None = option(None, "multitask_aggregation_fn")
    """How gradients of several losses are joined: gradmag, gradclip:MAX, pcgrad (these with +), gradnorm,
    approx_gradmag, approx_gradmag_preserve_mag. None: they are added."""

    gradnorm_alpha: float = option(1.0, "baseline.gradnorm_alpha")
    """GradNorm: strength of the restoring force; at least 0."""

    gradnorm_lr: float = option(0.025, "baseline.gradnorm_lr")
    """GradNorm: learning rate of the weights; positive."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.ema_alpha < 1:
            raise OptionError("{ema_alpha} must lie in [0, 1), got {}", self.ema_alpha)
        check_at_least(self, 0, "gradnorm_alpha")
        check_positive(self, "gradnorm_lr")
        sets_scale = [part.name for part in self.parts if part.name != "pcgrad"]
        if self.weight_mode not in (None, "static") and sets_scale:
            raise OptionError(
                "{weight_mode} {} and {aggregation} {} both set the scale of each loss: use one of them; "
                "pcgrad goes with either",
                self.weight_mode,
                sets_scale[0],
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The functions that `aggregation` names."""
        return parse_aggregation(self.aggregation)


@dataclass(frozen=True, slots=True)
class Part:
    """One function of `multitask_aggregation_fn`."""

    name: str
    limit: float | None = None
    """gradclip: the largest norm."""


def parse_aggregation(text: str | None) -> tuple[Part, ...]:
    """Read `multitask_aggregation_fn`: names joined with +, applied from left to right; None: no part.

    Raises:
        ValueError: an unknown name, with the nearest one; a limit that is missing, superfluous or not
            positive; functions that undo one another.
    """
    parts = () if text is None else tuple(_parse_part(part.strip()) for part in text.split("+"))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"multitask_aggregation_fn: {text!r} names a function twice")
    alone = [name for name in names if name in LAST_LAYER]
    if alone and len(names) > 1:
        raise ValueError(
            f"multitask_aggregation_fn: {alone[0]} cannot be joined with another function, got {text!r}: it "
            "looks at the last layer alone, and no loss' own gradient is ever formed"
        )
    if {"gradmag", "gradclip"} <= set(names):
        raise ValueError(
            f"multitask_aggregation_fn: {text!r} sets the norm of each gradient twice; gradmag makes it 1, "
            "gradclip bounds it: use one of them, with pcgrad or alone"
        )
    return parts


def _parse_part(text: str) -> Part:
    name, colon, value = text.partition(":")
    if name not in AGGREGATIONS:
        raise ValueError(
            f"multitask_aggregation_fn: {name!r} is unknown{nearest(name, AGGREGATIONS)}; expected "
            f"gradclip:MAX or one of {', '.join(known for known in AGGREGATIONS if known != 'gradclip')}"
        )
    if name != "gradclip":
        if colon:
            raise ValueError(f"multitask_aggregation_fn: {name} takes no value, got {text!r}")
        return Part(name)
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(
            f"multitask_aggregation_fn: gradclip takes the largest norm, a positive number, as in "
            f"gradclip:1.0; got {text!r}"
        )
    return Part(name, limit)
