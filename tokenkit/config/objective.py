"""Which losses, with which weights and options. Formulas: docs/losses.md."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenkit.errors import ConfigError, at_least
from tokenkit.losses.options import ALIASES, NAMES, LossOptions, find, needs_teacher, titles
from tokenkit.objective.options import ObjectiveOptions
from tokenkit.options import check_share, flat, option


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The losses and how they add up."""

    losses: tuple[str, ...] = field(
        default=("alm_unconstrained",),
        metadata={"help": f"{', '.join(titles())}; `module:function` for one's own."},
    )
    """Names or aliases of the table of losses, or functions of one's own."""

    loss_weights: tuple[float, ...] | Mapping[str, float] | None = None
    """One number per loss, or a mapping from loss to number (as flags: clm=1 alm_space=0.5). None: 1 each."""

    loss_schedules: tuple[str, ...] | Mapping[str, str] | None = None
    """Multiplies the weight: constant, linear, cosine, reverse_cosine over the run, or constant(v),
    linear(a,b,steps), cosine(a,b,steps), step(a,b,steps); one per loss or a mapping."""

    weighing: ObjectiveOptions = flat(ObjectiveOptions)

    mined_mapping_path: str | None = None
    """What `tokenkit mined-mapping` wrote, its folder or mapping.npy; or a .pt file with a tensor. A teacher
    id for each student id, for baseline_mined and side_path_mapping_mode mined."""

    tokenizer_pair_data_path: str | None = None
    """Folder that `tokenkit pair-stats` wrote, for alm_unbiased and side_path_mapping_mode bias_threshold."""

    kd_rate: float | None = option(None, "baseline.kd_rate")
    """Weighs each baseline with this and clm with 1 minus this, in [0, 1], in place of loss_weights."""

    options: LossOptions = flat(LossOptions)

    def __post_init__(self) -> None:
        if not self.losses:
            raise ConfigError(f"losses is empty: name at least one of {', '.join(NAMES)}")
        for name in self.losses:
            check_loss(name)
        canonical = [ALIASES.get(name, name) for name in self.losses]
        twice = [n for n, c in zip(self.losses, canonical, strict=True) if canonical.count(c) > 1]
        if twice:
            raise ConfigError(f"losses names one loss twice: {', '.join(twice)}")
        self._check_per_loss("loss_weights", self.loss_weights)
        self._check_per_loss("loss_schedules", self.loss_schedules)
        s_init = self.weighing.s_init
        if isinstance(s_init, Mapping) or (isinstance(s_init, tuple) and len(s_init) > 1):
            self._check_per_loss("uncertainty_s_init", s_init)
        check_share(self, "kd_rate")
        given = self.loss_weights or ()
        weights = tuple(given.values()) if isinstance(given, Mapping) else given
        for weight in weights:
            at_least("loss_weights", weight, 0)
        if len(weights) == len(self.losses) and not any(weights):
            raise ConfigError("loss_weights are all 0: nothing would be trained")
        self._check_files(canonical)
        if self.kd_rate is not None and not any(n.startswith("baseline_") for n in canonical):
            raise ConfigError(
                "baseline.kd_rate weighs a baseline against clm, and losses names no baseline "
                f"({', '.join(self.losses)}): add one, or use loss_weights"
            )
        if self.kd_rate is not None and self.loss_weights is not None:
            raise ConfigError(
                "baseline.kd_rate and loss_weights both weigh the losses: keep the one that is meant"
            )

    @property
    def static_weights(self) -> tuple[float, ...] | Mapping[str, float] | None:
        """`loss_weights`, or what `baseline.kd_rate` says."""
        rate = self.kd_rate
        if rate is None:
            return self.loss_weights
        names = {name: ALIASES.get(name, name) for name in self.losses}
        return {
            given: rate if name.startswith("baseline_") else 1 - rate if name == "clm" else 1.0
            for given, name in names.items()
        }

    def _check_files(self, canonical: list[str]) -> None:
        side_path = self.options.side_path.mapping if "alm_side_path" in canonical else None
        latents = self.options.latents.chunks if "alm_latents" in canonical else None
        needed = {
            "mined_mapping_path": ("mined-mapping", "baseline_mined" in canonical or side_path == "mined"),
            "tokenizer_pair_data_path": (
                "pair-stats",
                "alm_unbiased" in canonical or side_path == "bias_threshold" or latents == "unbiased",
            ),
        }
        paths = {
            "mined_mapping_path": self.mined_mapping_path,
            "tokenizer_pair_data_path": self.tokenizer_pair_data_path,
        }
        for name, (door, is_needed) in needed.items():
            if is_needed and paths[name] is None:
                raise ConfigError(
                    f"{name} is not set, and the losses need it: make one with `tokenkit {door}`"
                )

    @property
    def needs_teacher(self) -> bool:
        """Some loss compares the student with a teacher."""
        return any(map(needs_teacher, self.losses))

    def _check_per_loss(self, field_name: str, given: tuple[Any, ...] | Mapping[str, Any] | None) -> None:
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - set(self.losses))
            if unknown:
                raise ConfigError(
                    f"{field_name} names {', '.join(unknown)}, but the losses of this run are "
                    f"{', '.join(self.losses)}"
                )
        elif given and len(given) != len(self.losses):
            raise ConfigError(
                f"{field_name} must give one value per loss ({len(self.losses)}: {', '.join(self.losses)}), "
                f"got {len(given)}"
            )


def check_loss(name: str) -> None:
    """Refuse a name that is no loss.

    Raises:
        ConfigError: with the nearest name.
    """
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return
    try:
        find(name)
    except ValueError as error:
        raise ConfigError(f"losses: {error}") from error
