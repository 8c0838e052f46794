"""The optimizer and its learning rate, as a user says it. Nothing here loads torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tokenkit.options import Checked, OptionError, check_at_least, check_choices, check_positive, check_share

Shape = Literal["constant", "linear", "cosine"]
LearningRateSchedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear_warmup_constant",
    "linear",
    "cosine",
    "linear_warmup_cosine_decay",
    "linear_warmup_linear_decay",
]
SCHEDULES: dict[LearningRateSchedule, tuple[bool, Shape]] = {  # (warms up, what follows)
    "constant": (False, "constant"),
    "constant_with_warmup": (True, "constant"),
    "linear_warmup_constant": (True, "constant"),
    "linear": (True, "linear"),
    "linear_warmup_linear_decay": (True, "linear"),
    "cosine": (True, "cosine"),
    "linear_warmup_cosine_decay": (True, "cosine"),
}


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters with a learning rate of their own."""

    pattern: str
    """Regular expression, searched in parameter names; the first group that matches takes a parameter."""

    lr_scale: float = 1.0
    """Multiplies the learning rate of these parameters; 0 holds them still."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"optimizer.param_groups: {self.pattern!r} is not a regular expression: {error}"
            ) from None
        if not 0 <= self.lr_scale < float("inf"):
            raise ValueError(
                f"optimizer.param_groups: lr_scale of {self.pattern!r} must be at least 0, "
                f"got {self.lr_scale}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Checked):
    """AdamW and its learning rate."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""

    learning_rate: float = 1e-5
    """Peak of the schedule."""

    weight_decay: float = 0.01
    """Decoupled decay; vectors (biases, norms) have none."""

    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""

    beta2: float = 0.95
    """Decay of the second moment, in [0, 1)."""

    epsilon: float = 1e-8
    """Added to the root of the second moment."""

    max_grad_norm: float = 1.0
    """A larger global gradient norm is scaled down to this. 0: no clipping."""

    lr_scheduler_type: LearningRateSchedule | None = None
    """Another name of schedule; where both are set they must agree."""

    schedule: LearningRateSchedule | None = None
    """Learning rate over the run. None: linear_warmup_cosine_decay. Every schedule begins with
    warmup_steps of linear warmup, except `constant`."""

    lr_min_ratio: float = 0.0
    """The rate ends at this share of its peak, in [0, 1]."""

    use_fused_adam: bool = True
    """Fused kernel where the device has one."""

    param_groups: tuple[ParamGroup, ...] = ()
    """List of {pattern, lr_scale}; the first pattern that matches a parameter holds."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "learning_rate", "epsilon")
        check_at_least(self, 0, "weight_decay", "max_grad_norm")
        check_share(self, "lr_min_ratio")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{{{name}}} must lie in [0, 1), got {{}}", getattr(self, name))
        named = {name for name in (self.lr_scheduler_type, self.schedule) if name is not None}
        if len({SCHEDULES[name] for name in named}) > 1:
            raise OptionError(
                "{schedule} is {} but {lr_scheduler_type} is {}: keep the one that is meant",
                self.schedule,
                self.lr_scheduler_type,
            )

    @property
    def schedule_name(self) -> LearningRateSchedule:
        """The schedule that holds, under whichever of its names it was given."""
        return self.schedule or self.lr_scheduler_type or "linear_warmup_cosine_decay"
