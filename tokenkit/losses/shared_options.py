"""Options that several losses have, and the headings of their flags. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass

from tokenkit.kernels.kinds import Divergence
from tokenkit.options import (
    Checked,
    ChunkKind,
    OptionError,
    check_at_least,
    check_choices,
    check_positive,
    check_share,
    option,
)

WORKSPACE_BYTES = 256 * 2**20

HEADINGS = {"baseline": "Options of the baseline losses.", "baseline.gold": "Options of `baseline_gold`."}
"""Of groups of flags that several records share."""


@dataclass(frozen=True, kw_only=True)
class Workspace(Checked):
    """What every loss that multiplies with a head has."""

    workspace_bytes: int = option(WORKSPACE_BYTES, None)
    """Memory for heads beside results, bytes; more lets a loss keep what its backward would compute again."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 0, "workspace_bytes")


@dataclass(frozen=True, kw_only=True)
class Chunked(Workspace):
    """Of losses that look at chunks."""

    chunks: ChunkKind = option("unconstrained", None)
    """Which of the batch's chunks."""


@dataclass(frozen=True, kw_only=True)
class Temperature(Workspace):
    """Of losses that divide the logits of both models."""

    temperature: float = option(1.0, "baseline.kd_temp")
    """Divides the logits of both models, where a loss compares distributions; positive. baseline_gold has its
    own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "temperature")


@dataclass(frozen=True, kw_only=True)
class Temperatures(Temperature):
    """Of losses whose teacher may have a temperature of its own."""

    teacher_temperature: float = option(1.0, "baseline.teacher_temperature")
    """Multiplies kd_temp for the teacher, but in baseline_uld and baseline_gold; positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "teacher_temperature")


@dataclass(frozen=True, kw_only=True)
class Diverging(Temperatures):
    """Of losses that compare distributions by a divergence that one may choose."""

    divergence: Divergence = option("kl", "baseline.divergence")
    """Divergence of two distributions; of baseline_dskd, in the student's space."""

    skew: float = option(0.1, "baseline.skew_lambda")
    """Mixing share of skl and srkl, in [0, 1]."""

    alpha: float = option(0.5, "baseline.adaptive_kl_alpha")
    """Mass left to the tail in `akl`, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "skew", "alpha")
        if self.divergence == "akl" and self.alpha == 1:
            raise OptionError("{alpha} must be below 1 for akl: divergence rkl is its limit")
