"""Which losses, with which weights and options. Formulas: docs/losses.md."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenkit.config.errors import ConfigError, at_least, check_parts, nearest
from tokenkit.config.gold import Gold
from tokenkit.config.names import (
    AGGREGATIONS,
    ALM_MODES,
    LOSS_ALIASES,
    LOSS_NAMES,
    LOSSES_WITHOUT_TEACHER,
    SPACE_MASK_PARTS,
    Denominator,
    Difference,
    Divergence,
    Numerator,
)
from tokenkit.config.schema import flat


@dataclass(frozen=True, kw_only=True)
class Alm:
    """Options of the ALM losses."""

    alm_diff_fn: Difference = "binary_ce"
    """Difference between the log-probabilities that teacher and student give a chunk."""

    alm_mode: str = "merge_by_space_prob+append_space"
    """Whitespace debiasing, joined with `+`: append_space, merge_by_space_prob; with eos_as_space they look
    at the probability of EOS instead of whitespace; or none."""

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
    """merge_by_space_prob joins chunks until the teacher's probability of whitespace exceeds this, and
    alm_unbiased until both tokenisation biases are at most this; in (0, 1)."""

    tokenizer_pair_data_path: str | None = None
    """Folder that `tokenkit pair-stats` wrote, for alm_unbiased and side_path_mapping_mode bias_threshold."""

    def __post_init__(self) -> None:
        check_parts("alm_mode", self.alm_mode, ALM_MODES)
        check_parts("space_mask_mode", self.space_mask_mode, SPACE_MASK_PARTS)
        if "none" in self.alm_mode.split("+") and self.alm_mode != "none":
            raise ConfigError(f"alm_mode {self.alm_mode!r}: none cannot be joined with another mode")
        if self.alm_mode == "eos_as_space":
            raise ConfigError(
                "alm_mode 'eos_as_space' alone changes nothing: it puts EOS in the place of whitespace for "
                "append_space and merge_by_space_prob; join it with one of them"
            )
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
    """Which tokens of the two vocabularies are compared: those with the same bytes; with bias_threshold, of
    these the ones with small tokenisation biases; or those of mined_mapping_path."""

    side_path_distance_fn: Literal["kl", "reverse_kl", "kl_subset", "reverse_kl_subset", "log_abs", "abs"] = (
        "kl_subset"
    )
    """Distance of the two next-token distributions over those tokens: kl and reverse_kl with all others as
    one outcome, *_subset over them alone; log_abs, abs of their probabilities."""

    tokenizer_pair_bias_threshold_side_path: float = 0.1
    """Largest tokenisation bias of a pair, with bias_threshold; in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.tokenizer_pair_bias_threshold_side_path <= 1:
            raise ConfigError(
                "tokenizer_pair_bias_threshold_side_path must lie in [0, 1], got "
                f"{self.tokenizer_pair_bias_threshold_side_path}"
            )


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Options of `alm_latents`."""

    latents_to_align: Literal["last_hidden_state", "all_hidden_states", "qkv"] = "last_hidden_state"
    """What is compared: the last hidden states, every layer's, or every layer's queries, keys and values."""

    latents_normalization: Literal["l1", "l2", "l1_channelwise", "l2_channelwise"] = "l2_channelwise"
    """Absolute or squared differences, over the mean of the teacher's, of all channels or each."""

    latents_chunks: Literal["naive", "space"] = "naive"
    """At the ends of which chunks: the smallest, or those joined up to whitespace."""

    latents_do_project: bool = False
    """Train a projection where the widths differ."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Options of the baseline losses."""

    divergence: Divergence = "kl"
    """Divergence of baseline_mined, and of baseline_dskd in the student's space."""

    kd_temp: float = 1.0
    """Temperature of both models in every baseline but baseline_gold, which has its own; positive."""

    kd_rate: float | None = None
    """Weighs each baseline with this and clm with 1 minus this, in [0, 1], in place of loss_weights."""

    teacher_temperature: float = 1.0
    """Multiplies kd_temp for the teacher, but in baseline_uld and baseline_gold; positive."""

    skew_lambda: float = 0.1
    """Mixing share of skl and srkl, in [0, 1]."""

    adaptive_kl_alpha: float = 0.5
    """Mass left to the tail in `akl`, in [0, 1]."""

    exact_sort: bool | None = None
    """Compare by rank with a sort (true) or with histograms (false: faster on a GPU, off by a known bound).
    None: baseline_gold sorts; baseline_uld and baseline_gold_js where no vocabulary is above 8192 ids,
    and on a CPU if the workspace has room; never divided heads. Errors by kind of row: docs/kernels.md."""

    uld_extended: bool = False
    """baseline_uld: compare groups of tokens that end at the same byte, not token i with token i."""

    dskd_use_causal_attention_mask: bool = True
    """DSKD: a position attends only to text that ends no later than its own."""

    gradnorm_alpha: float = 1.0
    """GradNorm: strength of the restoring force; at least 0."""

    gradnorm_lr: float = 0.025
    """GradNorm: learning rate of the weights; positive."""

    gold: Gold = field(default_factory=Gold)

    def __post_init__(self) -> None:
        at_least("baseline.gradnorm_alpha", self.gradnorm_alpha, 0)
        for name in ("gradnorm_lr", "kd_temp", "teacher_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"baseline.{name} must be positive, got {getattr(self, name)}")
        for name in ("kd_rate", "skew_lambda", "adaptive_kl_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"baseline.{name} must lie in [0, 1], got {value}")
        if self.divergence == "akl" and self.adaptive_kl_alpha == 1:
            raise ConfigError(
                "baseline.adaptive_kl_alpha must be below 1 for akl: divergence rkl is its limit"
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The losses and how they add up."""

    losses: tuple[str, ...] = ("alm_unconstrained",)
    """clm (sft), alm_unconstrained (alm_greedy), alm_space, alm_unbiased (alm), alm_side_path, alm_latents,
    baseline_uld, baseline_mined (baseline_minED), baseline_dskd, baseline_gold, baseline_gold_js,
    baseline_xtoken; `module:function` for one's own."""

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
    """What `tokenkit mined-mapping` wrote, its folder or mapping.npy; or a .pt file with a tensor. A teacher
    id for each student id, for baseline_mined and side_path_mapping_mode mined."""

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
        given = self.loss_weights or ()
        weights = tuple(given.values()) if isinstance(given, Mapping) else given
        for weight in weights:
            at_least("loss_weights", weight, 0)
        if len(weights) == len(self.losses) and not any(weights):
            raise ConfigError("loss_weights are all 0: nothing would be trained")
        self._check_files(canonical)
        if self.baseline.kd_rate is not None and not any(n.startswith("baseline_") for n in canonical):
            raise ConfigError(
                "baseline.kd_rate weighs a baseline against clm, and losses names no baseline "
                f"({', '.join(self.losses)}): add one, or use loss_weights"
            )
        if self.baseline.kd_rate is not None and self.loss_weights is not None:
            raise ConfigError(
                "baseline.kd_rate and loss_weights both weigh the losses: keep the one that is meant"
            )

    @property
    def static_weights(self) -> tuple[float, ...] | Mapping[str, float] | None:
        """`loss_weights`, or what `baseline.kd_rate` says."""
        rate = self.baseline.kd_rate
        if rate is None:
            return self.loss_weights
        names = {name: LOSS_ALIASES.get(name, name) for name in self.losses}
        return {
            given: rate if name.startswith("baseline_") else 1 - rate if name == "clm" else 1.0
            for given, name in names.items()
        }

    def _check_files(self, canonical: list[str]) -> None:
        side_path = self.side_path.side_path_mapping_mode if "alm_side_path" in canonical else None
        needed = {
            "mined_mapping_path": ("mined-mapping", "baseline_mined" in canonical or side_path == "mined"),
            "tokenizer_pair_data_path": (
                "pair-stats",
                "alm_unbiased" in canonical or side_path == "bias_threshold",
            ),
        }
        paths = {
            "mined_mapping_path": self.mined_mapping_path,
            "tokenizer_pair_data_path": self.alm.tokenizer_pair_data_path,
        }
        for name, (door, is_needed) in needed.items():
            if is_needed and paths[name] is None:
                raise ConfigError(
                    f"{name} is not set, and the losses need it: make one with `tokenkit {door}`"
                )

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
        ConfigError: with the nearest name.
    """
    if name in LOSS_NAMES or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return
    near = nearest(name, LOSS_NAMES)
    raise ConfigError(
        f"losses: {name!r} is no loss{near}; expected one of {', '.join(LOSS_NAMES)}, or module:function"
    )
