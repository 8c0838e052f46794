"""Which losses, with which weights and options. Formulas: docs/losses.md."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenkit.config.errors import ConfigError, at_least, check_parts, nearest
from tokenkit.config.names import (
    AGGREGATIONS,
    ALM_MODES,
    LATER_LOSSES,
    LOSS_ALIASES,
    LOSS_NAMES,
    LOSSES_WITHOUT_TEACHER,
    SPACE_MASK_PARTS,
    Denominator,
    Difference,
    Numerator,
)
from tokenkit.config.schema import flat


@dataclass(frozen=True, kw_only=True)
class Alm:
    """Options of the ALM losses."""

    alm_diff_fn: Difference = "binary_ce"
    """Difference between the log-probabilities that teacher and student give a chunk."""

    alm_mode: str = "merge_by_space_prob+append_space"
    """Whitespace debiasing, joined with `+`: append_space, merge_by_space_prob, eos_as_space; or none."""

    binarization_temp: float = 100.0
    """Divides chunk log-probabilities (nats) before they are compared."""

    renyi_alpha: float = 0.5
    """Order of the `renyi` difference; positive, not 1."""

    distill_chunk_sizes: tuple[int, ...] = (1,)
    """For each size c, c neighbouring chunks count as one; the losses of the sizes are averaged."""

    distill_main_path_numerator: Numerator = "chunk_count"
    """Weight of a chunk: 1, its teacher tokens, or log(1 + them)."""

    distill_main_path_denominator: Denominator = "chunk_count"
    """What the sum is divided by: the valid chunks of the whole step, or their teacher tokens."""

    space_mask_mode: str = "space+tab+newline+special"
    """Tokens that count as beginning with whitespace: space, tab, newline, special, joined with `+`."""

    tokenizer_pair_bias_threshold: float = 0.1
    """merge_by_space_prob joins chunks until the teacher's probability of whitespace exceeds this, in
    (0, 1)."""

    tokenizer_pair_data_path: str | None = None
    """Folder of tokenizer-pair statistics, for alm_unbiased."""

    def __post_init__(self) -> None:
        check_parts("alm_mode", self.alm_mode, ALM_MODES)
        check_parts("space_mask_mode", self.space_mask_mode, SPACE_MASK_PARTS)
        if "none" in self.alm_mode.split("+") and self.alm_mode != "none":
            raise ConfigError(f"alm_mode {self.alm_mode!r}: none cannot be joined with another mode")
        if self.binarization_temp <= 0:
            raise ConfigError(f"binarization_temp must be positive, got {self.binarization_temp}")
        if self.renyi_alpha <= 0 or self.renyi_alpha == 1:
            raise ConfigError(f"renyi_alpha must be positive and not 1, got {self.renyi_alpha}")
        if not self.distill_chunk_sizes or min(self.distill_chunk_sizes) < 1:
            raise ConfigError(
                f"distill_chunk_sizes must hold sizes of at least 1, got {list(self.distill_chunk_sizes)}"
            )
        if not 0 < self.tokenizer_pair_bias_threshold < 1:
            raise ConfigError(
                f"tokenizer_pair_bias_threshold must lie in (0, 1), got {self.tokenizer_pair_bias_threshold}"
            )

    def options(self, chunks: str) -> dict[str, Any]:
        """The keyword arguments of `tokenkit.losses.alm.AlmOptions`, for one kind of chunk."""
        return {
            "diff": self.alm_diff_fn,
            "mode": self.alm_mode,
            "chunks": chunks,
            "binarization_temp": self.binarization_temp,
            "renyi_alpha": self.renyi_alpha,
            "chunk_sizes": self.distill_chunk_sizes,
            "numerator": self.distill_main_path_numerator,
            "denominator": self.distill_main_path_denominator,
            "space_threshold": self.tokenizer_pair_bias_threshold,
        }


@dataclass(frozen=True, kw_only=True)
class SidePath:
    """Options of `alm_side_path`."""

    side_path_mapping_mode: Literal["exact_match", "bias_threshold", "mined"] = "exact_match"
    """Which tokens of the two vocabularies are compared."""

    side_path_distance_fn: Literal["kl", "reverse_kl", "kl_subset", "reverse_kl_subset", "log_abs", "abs"] = (
        "kl_subset"
    )
    """Distance of the two next-token distributions over those tokens."""

    tokenizer_pair_bias_threshold_side_path: float = 0.1
    """Largest tokenisation bias of a pair, with `bias_threshold`."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Options of `alm_latents`."""

    latents_to_align: Literal["last_hidden_state", "all_hidden_states", "qkv"] = "last_hidden_state"
    """Which hidden states are compared."""

    latents_normalization: Literal["l1", "l2", "l1_channelwise", "l2_channelwise"] = "l2_channelwise"
    """What their distance is divided by."""

    latents_chunks: Literal["naive", "space"] = "naive"
    """At the ends of which chunks."""

    latents_do_project: bool = False
    """Train a projection where the widths differ."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Options of the baseline losses."""

    divergence: Literal["kl", "rkl", "skl", "srkl", "js", "akl"] = "kl"
    """Divergence of DSKD between two heads."""

    kd_temp: float = 1.0
    """Temperature of both models."""

    kd_rate: float = 0.5
    """Share of the distillation term."""

    teacher_temperature: float = 1.0
    """Multiplies kd_temp for the teacher."""

    skew_lambda: float = 0.1
    """Mixing share of the skewed divergences, in (0, 1)."""

    adaptive_kl_alpha: float = 0.5
    """Mass left to the tail in `akl`, in (0, 1)."""

    dskd_use_causal_attention_mask: bool = True
    """DSKD: a position attends only to text that ends no later than its own."""

    gradnorm_alpha: float = 1.0
    """GradNorm: strength of the restoring force; at least 0."""

    gradnorm_lr: float = 0.025
    """GradNorm: learning rate of the weights; positive."""

    def __post_init__(self) -> None:
        at_least("baseline.gradnorm_alpha", self.gradnorm_alpha, 0)
        if self.gradnorm_lr <= 0:
            raise ConfigError(f"baseline.gradnorm_lr must be positive, got {self.gradnorm_lr}")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The losses and how they add up."""

    losses: tuple[str, ...] = ("alm_unconstrained",)
    """clm (sft), alm_unconstrained (alm_greedy), alm_space; `module:function` for one's own."""

    loss_weights: tuple[float, ...] | Mapping[str, float] | None = None
    """One number per loss, or a mapping from loss to number (as flags: clm=1 alm_space=0.5). None: 1 each."""

    loss_weight_mode: Literal["static", "uncertainty", "balance", "ema"] | None = None
    """What multiplies loss_weights and schedule. None or static: 1; uncertainty: e^-s, s trained; balance:
    1 / loss; ema: 1 / running mean of the loss."""

    uncertainty_s_init: float | tuple[float, ...] | Mapping[str, float] = 0.0
    """Start of the log-variances s, with `uncertainty`; one for all, one per loss or a mapping."""

    ema_alpha: float = 0.99
    """Share of the past in the running mean of a loss, with `ema`; in [0, 1)."""

    loss_schedules: tuple[str, ...] | Mapping[str, str] | None = None
    """Multiplies the weight: constant, linear, cosine, reverse_cosine over the run, or constant(v),
    linear(a,b,steps), cosine(a,b,steps); one per loss or a mapping."""

    multitask_aggregation_fn: str | None = None
    """How gradients of several losses are joined: gradmag, gradclip:MAX, pcgrad (these with +), gradnorm,
    approx_gradmag, approx_gradmag_preserve_mag. None: they are added."""

    mined_mapping_path: str | None = None
    """File of a mined vocabulary mapping."""

    alm: Alm = flat(Alm)
    side_path: SidePath = flat(SidePath)
    latents: Latents = flat(Latents)
    baseline: Baseline = field(default_factory=Baseline)

    def __post_init__(self) -> None:
        if not self.losses:
            raise ConfigError(f"losses is empty: name at least one of {', '.join(LOSS_NAMES)}")
        for name in self.losses:
            check_loss(name)
        canonical = [LOSS_ALIASES.get(name, name) for name in self.losses]
        if len(set(canonical)) < len(canonical):
            raise ConfigError(f"losses names one loss twice: {', '.join(self.losses)}")
        self._check_per_loss("loss_weights", self.loss_weights)
        self._check_per_loss("loss_schedules", self.loss_schedules)
        s_init = self.uncertainty_s_init
        if isinstance(s_init, Mapping) or (isinstance(s_init, tuple) and len(s_init) > 1):
            self._check_per_loss("uncertainty_s_init", s_init)
        if self.multitask_aggregation_fn is not None:
            names = [part.partition(":")[0].strip() for part in self.multitask_aggregation_fn.split("+")]
            check_parts("multitask_aggregation_fn", "+".join(names), AGGREGATIONS)
        if not 0 <= self.ema_alpha < 1:
            raise ConfigError(f"ema_alpha must lie in [0, 1), got {self.ema_alpha}")
        weights = self.loss_weights or ()
        for weight in weights.values() if isinstance(weights, Mapping) else weights:
            at_least("loss_weights", weight, 0)

    def weighing(self) -> dict[str, Any]:
        """The keyword arguments of `tokenkit.objective.ObjectiveOptions`."""
        return {
            "weight_mode": self.loss_weight_mode or "static",
            "s_init": self.uncertainty_s_init,
            "ema_alpha": self.ema_alpha,
            "aggregation": self.multitask_aggregation_fn,
            "gradnorm_alpha": self.baseline.gradnorm_alpha,
            "gradnorm_lr": self.baseline.gradnorm_lr,
        }

    @property
    def needs_teacher(self) -> bool:
        """Some loss compares the student with a teacher."""
        return any(name not in LOSSES_WITHOUT_TEACHER for name in self.losses)

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
        ConfigError: unknown, with the nearest name; or known but not here yet.
    """
    if name in LOSS_NAMES or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return
    if name in LATER_LOSSES:
        raise ConfigError(
            f"losses: {name} is accepted but its feature comes with {LATER_LOSSES[name]}; "
            f"use one of {', '.join(LOSS_NAMES)}"
        )
    near = nearest(name, LOSS_NAMES)
    raise ConfigError(
        f"losses: {name!r} is no loss{near}; expected one of {', '.join(LOSS_NAMES)}, or module:function"
    )
