"""The options of `baseline_gold`, by their names and with their defaults in TRL's GOLDConfig."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tokenkit.config.errors import ConfigError, at_least
from tokenkit.config.names import MergeStrategy


@dataclass(frozen=True, kw_only=True)
class Gold:
    """Options of `baseline_gold`."""

    use_extended_uld: bool = True
    """Compare groups of tokens that end at the same byte; false: token i of an answer with token i."""

    uld_token_merge_strategy: MergeStrategy = "observed"
    """Which row speaks for a group: observed, that of its first token itself; bayesian, the one that
    predicts its last token."""

    uld_use_hybrid_loss: bool = False
    """Compare tokens of both vocabularies one by one, and only the others by rank."""

    uld_hybrid_matched_weight: float | None = None
    """Weight of the former; None: their share of the teacher's vocabulary. Both weights or neither."""

    uld_hybrid_unmatched_weight: float | None = None
    """Weight of the latter; None: 1 minus that share."""

    uld_crossentropy_weight: float = 0.0
    """Weight of the student's cross entropy with its answers, inside this loss."""

    uld_distillation_weight: float = 1.0
    """Weight of what is compared with the teacher, inside this loss."""

    uld_student_temperature: float = 1.0
    """Divides the student's logits; positive. `baseline.kd_temp` does not act here."""

    uld_teacher_temperature: float = 1.0
    """Divides the teacher's logits; positive."""

    uld_skip_student_eos: bool = True
    """Leave the last token of each of the student's answers out of the comparison."""

    uld_skip_teacher_eos: bool = True
    """Leave the last token of each of the teacher's answers out of the comparison."""

    beta: float = 0.5
    """Of the divergence of matched tokens, in [0, 1]: 0 forward, 1 reverse, between them Jensen-Shannon."""

    def __post_init__(self) -> None:
        weights = {
            f"baseline.gold.uld_hybrid_{name}_weight": getattr(self, f"uld_hybrid_{name}_weight")
            for name in ("matched", "unmatched")
        }
        given = [name for name, weight in weights.items() if weight is not None]
        if len(given) == 1:
            raise ConfigError(f"{' and '.join(weights)} belong together: give both or neither")
        if given and not self.uld_use_hybrid_loss:
            raise ConfigError(f"{given[0]} acts only where baseline.gold.uld_use_hybrid_loss is true")
        for name in given:
            at_least(name, weights[name], 0)
        for name in ("uld_crossentropy_weight", "uld_distillation_weight"):
            at_least(f"baseline.gold.{name}", getattr(self, name), 0)
        for name in ("uld_student_temperature", "uld_teacher_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"baseline.gold.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"baseline.gold.beta must lie in [0, 1], got {self.beta}")

    def rules(self) -> dict[str, Any]:
        """The keyword arguments of `tokenkit.losses.GoldRules`."""
        return dataclasses.asdict(self)
