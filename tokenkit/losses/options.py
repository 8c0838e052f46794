"""The options of every loss, and the table of losses. Nothing here loads torch: doors read it.

A loss is two things: a record of options here, and a class in the module of the table that does the work. A
field's docstring is the help of its flag.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tokenkit.errors import nearest
from tokenkit.kernels.kinds import Difference
from tokenkit.losses.shared_options import WORKSPACE_BYTES as WORKSPACE_BYTES
from tokenkit.losses.shared_options import Chunked, Diverging, Temperature, Temperatures, Workspace
from tokenkit.options import (
    Checked,
    OptionError,
    check_at_least,
    check_choices,
    check_parts,
    check_positive,
    check_share,
    flag_of,
    flat,
    option,
)

ALM_MODES = ("append_space", "merge_by_space_prob", "eos_as_space", "none")
Numerator = Literal["chunk_count", "token_count", "log1p_token_count"]
Denominator = Literal["chunk_count", "token_count"]
Distance = Literal["kl", "reverse_kl", "kl_subset", "reverse_kl_subset", "log_abs", "abs"]
Mapping = Literal["exact_match", "bias_threshold", "mined"]
Align = Literal["last_hidden_state", "all_hidden_states", "qkv"]
Normalization = Literal["l1", "l2", "l1_channelwise", "l2_channelwise"]
LatentChunks = Literal["naive", "space", "unconstrained", "unbiased"]
Strategy = Literal["observed", "bayesian"]


@dataclass(frozen=True, kw_only=True)
class ClmOptions(Workspace):
    """Options of `clm`."""


@dataclass(frozen=True, kw_only=True)
class AlmOptions(Chunked):
    """Options of the ALM losses."""

    diff: Difference = option("binary_ce", "alm_diff_fn")
    """Difference between the log-probabilities that teacher and student give a chunk."""

    mode: str = option("merge_by_space_prob+append_space", "alm_mode")
    """Whitespace debiasing, joined with `+`: append_space, merge_by_space_prob; with eos_as_space they look
    at the probability of EOS instead of whitespace; or none."""

    binarization_temp: float = 100.0
    """Divides chunk log-probabilities (nats) before they are compared."""

    renyi_alpha: float = 0.5
    """Order of the `renyi` difference; positive, not 1."""

    chunk_sizes: tuple[int, ...] = option((1,), "distill_chunk_sizes")
    """For each size c, c neighbouring chunks count as one; the losses of the sizes are averaged."""

    numerator: Numerator = option("chunk_count", "distill_main_path_numerator")
    """Weight of a chunk: 1, its teacher tokens, or log(1 + them)."""

    denominator: Denominator = option("chunk_count", "distill_main_path_denominator")
    """What the sum is divided by: the valid chunks of the whole step, or their teacher tokens."""

    space_threshold: float = option(0.1, "tokenizer_pair_bias_threshold")
    """merge_by_space_prob joins chunks until the teacher's probability of whitespace exceeds this, and
    alm_unbiased until both tokenisation biases are at most this; in (0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts("mode", self.mode or "none", ALM_MODES)
        if self.mode != "none" and "none" in self.mode.split("+"):
            raise OptionError("{mode} {!r}: none cannot be joined with another mode", self.mode)
        if self.mode == "eos_as_space":
            raise OptionError(
                "{mode} 'eos_as_space' alone changes nothing: it puts EOS in the place of whitespace for "
                "append_space and merge_by_space_prob; join it with one of them"
            )
        check_positive(self, "binarization_temp", "renyi_alpha")
        if self.renyi_alpha == 1:
            raise OptionError("{renyi_alpha} must be positive and not 1, got {}", self.renyi_alpha)
        if not self.chunk_sizes or min(self.chunk_sizes) < 1:
            raise OptionError("{chunk_sizes} must hold sizes of at least 1, got {}", list(self.chunk_sizes))
        if not 0 < self.space_threshold < 1:
            raise OptionError("{space_threshold} must lie in (0, 1), got {}", self.space_threshold)

    @property
    def modes(self) -> frozenset[str]:
        """The parts of `mode`."""
        return frozenset(self.mode.split("+")) - {"none", ""}


@dataclass(frozen=True, kw_only=True)
class SidePathOptions(Chunked):
    """Options of `alm_side_path`."""

    mapping: Mapping = option("exact_match", "side_path_mapping_mode", of_pair=True)
    """Which tokens of the two vocabularies are compared: those with the same bytes; with bias_threshold, of
    these the ones with small tokenisation biases; or those of mined_mapping_path."""

    distance_fn: Distance = option("kl_subset", "side_path_distance_fn")
    """Distance of the two next-token distributions over those tokens: kl and reverse_kl with all others as
    one outcome, *_subset over them alone; log_abs, abs of their probabilities."""

    bias_threshold: float = option(0.1, "tokenizer_pair_bias_threshold_side_path", of_pair=True)
    """Largest tokenisation bias of a pair, with bias_threshold; in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "bias_threshold")


@dataclass(frozen=True, kw_only=True)
class LatentsOptions(Checked):
    """Options of `alm_latents`."""

    align: Align = option("last_hidden_state", "latents_to_align")
    """What is compared: the last hidden states, every layer's, or every layer's queries, keys and values."""

    normalization: Normalization = option("l2_channelwise", "latents_normalization")
    """Absolute or squared differences, over the mean of the teacher's, of all channels or each."""

    chunks: LatentChunks = option("naive", "latents_chunks")
    """At the ends of which chunks: the smallest (naive, unconstrained), or those joined up to whitespace, or
    up to small tokenisation biases (unbiased)."""

    project: bool = option(False, "latents_do_project")
    """Train a projection where the widths differ."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class UldOptions(Temperature, Chunked):
    """Options of `baseline_uld`."""

    exact: bool | None = option(None, "baseline.exact_sort")
    """Compare by rank with a sort (true) or with histograms (false: faster on a GPU, off by a known bound).
    None: baseline_gold sorts; baseline_uld and baseline_gold_js where no vocabulary is above 8192 ids,
    and on a CPU if the workspace has room; never divided heads. Errors by kind of row: docs/kernels.md."""

    extended: bool = option(False, "baseline.uld_extended")
    """baseline_uld: compare groups of tokens that end at the same byte, not token i with token i."""


@dataclass(frozen=True, kw_only=True)
class MinedOptions(Diverging, Chunked):
    """Options of `baseline_mined`."""


@dataclass(frozen=True, kw_only=True)
class DskdOptions(Diverging):
    """Options of `baseline_dskd`."""

    causal: bool = option(True, "baseline.dskd_use_causal_attention_mask")
    """DSKD: a position attends only to text that ends no later than its own."""


@dataclass(frozen=True, kw_only=True)
class GoldOptions(Chunked):
    """Options of `baseline_gold`, by their names and with their defaults in TRL's GOLDConfig."""

    use_extended_uld: bool = option(True, "baseline.gold.use_extended_uld")
    """Compare groups of tokens that end at the same byte; false: token i of an answer with token i."""

    uld_token_merge_strategy: Strategy = option("observed", "baseline.gold.uld_token_merge_strategy")
    """Which row speaks for a group: observed, that of its first token itself; bayesian, the one that
    predicts its last token."""

    uld_use_hybrid_loss: bool = option(False, "baseline.gold.uld_use_hybrid_loss")
    """Compare tokens of both vocabularies one by one, and only the others by rank."""

    uld_hybrid_matched_weight: float | None = option(None, "baseline.gold.uld_hybrid_matched_weight")
    """Weight of the former; None: their share of the teacher's vocabulary. Both weights or neither."""

    uld_hybrid_unmatched_weight: float | None = option(None, "baseline.gold.uld_hybrid_unmatched_weight")
    """Weight of the latter; None: 1 minus that share."""

    uld_crossentropy_weight: float = option(0.0, "baseline.gold.uld_crossentropy_weight")
    """Weight of the student's cross entropy with its answers, inside this loss."""

    uld_distillation_weight: float = option(1.0, "baseline.gold.uld_distillation_weight")
    """Weight of what is compared with the teacher, inside this loss."""

    uld_student_temperature: float = option(1.0, "baseline.gold.uld_student_temperature")
    """Divides the student's logits; positive. `baseline.kd_temp` does not act here."""

    uld_teacher_temperature: float = option(1.0, "baseline.gold.uld_teacher_temperature")
    """Divides the teacher's logits; positive."""

    uld_skip_student_eos: bool = option(True, "baseline.gold.uld_skip_student_eos")
    """Leave the last token of each of the student's answers out of the comparison."""

    uld_skip_teacher_eos: bool = option(True, "baseline.gold.uld_skip_teacher_eos")
    """Leave the last token of each of the teacher's answers out of the comparison."""

    beta: float = option(0.5, "baseline.gold.beta")
    """Of the divergence of matched tokens, in [0, 1]: 0 forward, 1 reverse, between them Jensen-Shannon."""

    exact: bool | None = option(None, "baseline.exact_sort")
    """As in `UldOptions`; None sorts here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        hybrid = ("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight")
        given = [name for name in hybrid if getattr(self, name) is not None]
        if len(given) == 1:
            raise OptionError(
                "{uld_hybrid_matched_weight} and {uld_hybrid_unmatched_weight} belong together: give both or "
                "neither"
            )
        if given and not self.uld_use_hybrid_loss:
            raise OptionError("{uld_hybrid_matched_weight} acts only where {uld_use_hybrid_loss} is true")
        check_at_least(self, 0, *hybrid, "uld_crossentropy_weight", "uld_distillation_weight")
        check_positive(self, "uld_student_temperature", "uld_teacher_temperature")
        check_share(self, "beta")


@dataclass(frozen=True, kw_only=True)
class GoldJsOptions(Temperatures, Chunked):
    """Options of `baseline_gold_js`."""

    matched_weight: float | None = option(None, None)
    """Weight of matched tokens, in [0, 1]; None: their share of the teacher's vocabulary."""

    exact: bool | None = option(None, "baseline.exact_sort")
    """As in `UldOptions`, of the unmatched tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "matched_weight")


@dataclass(frozen=True, kw_only=True)
class XTokenOptions(Temperatures, Chunked):
    """Options of `baseline_xtoken`."""


@dataclass(frozen=True, kw_only=True)
class KlOptions(Diverging):
    """Options of `kl`."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The options of every loss, as one configuration sets them."""

    clm: ClmOptions = flat(ClmOptions)
    alm: AlmOptions = flat(AlmOptions)
    side_path: SidePathOptions = flat(SidePathOptions)
    latents: LatentsOptions = flat(LatentsOptions)
    mined: MinedOptions = flat(MinedOptions)
    uld: UldOptions = flat(UldOptions)
    dskd: DskdOptions = flat(DskdOptions)
    gold: GoldOptions = flat(GoldOptions)
    gold_js: GoldJsOptions = flat(GoldJsOptions)
    xtoken: XTokenOptions = flat(XTokenOptions)
    kl: KlOptions = flat(KlOptions)

    def __post_init__(self) -> None:
        seen: dict[str, Any] = {}
        for group in fields(self):
            options = getattr(self, group.name)
            for one in fields(options):
                flag, value = flag_of(one), getattr(options, one.name)
                if flag is not None and seen.setdefault(flag, value) != value:
                    raise OptionError(f"{flag} is one option of several losses: got {{}}", value)

    def of(self, name: str) -> dict[str, Any]:
        """Return the options of a loss, by name or alias, as the keyword arguments of `make_loss`."""
        if ":" in name:
            return {}
        entry = find(name)
        options = getattr(self, entry.place.partition(":")[0])
        return {one.name: getattr(options, one.name) for one in fields(options)} | entry.fixed


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a loss is."""

    place: str
    """`module:class` below `tokenkit.losses`; imported when it is used."""
    options: type[Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    """Options that the name says."""
    aliases: tuple[str, ...] = ()
    needs_teacher: bool = True
    one_tokenizer: bool = False
    """It compares id with id, and is for models that share their tokenizer."""


LOSSES: dict[str, Entry] = {
    "clm": Entry("clm:Clm", ClmOptions, aliases=("sft",), needs_teacher=False),
    "alm_unconstrained": Entry("alm:Alm", AlmOptions, {"chunks": "unconstrained"}, ("alm_greedy",)),
    "alm_space": Entry("alm:Alm", AlmOptions, {"chunks": "space"}),
    "alm_unbiased": Entry("alm:Alm", AlmOptions, {"chunks": "unbiased"}, ("alm",)),
    "alm_side_path": Entry("side_path:SidePath", SidePathOptions),
    "alm_latents": Entry("latents:Latents", LatentsOptions),
    "baseline_uld": Entry("uld:Uld", UldOptions),
    "baseline_mined": Entry("mined:Mined", MinedOptions, aliases=("baseline_minED",)),
    "baseline_dskd": Entry("dskd:Dskd", DskdOptions),
    "baseline_gold": Entry("gold:Gold", GoldOptions),
    "baseline_gold_js": Entry("gold_js:GoldJs", GoldJsOptions),
    "baseline_xtoken": Entry("xtoken:XToken", XTokenOptions),
    "kl": Entry("kl:Kl", KlOptions, one_tokenizer=True),
}
"""By the name that a user gives. A new loss is its module, its options above and a line here."""

ALIASES = {alias: name for name, entry in LOSSES.items() for alias in entry.aliases}
NAMES = tuple(x for name, entry in LOSSES.items() for x in (name, *entry.aliases))
"""Names and aliases, in the order of the table."""


CROSS_TOKENIZER = tuple(name for name, entry in LOSSES.items() if not entry.one_tokenizer)


def titles() -> list[str]:
    """Return each name with its aliases, as in `clm (sft)`."""
    return [f"{x} ({', '.join(e.aliases)})" if e.aliases else x for x, e in LOSSES.items()]


def readers(flag: str) -> tuple[str, ...]:
    """Return the names of the losses that read the option of a flag."""
    return tuple(x for x, entry in LOSSES.items() if flag in map(flag_of, fields(entry.options)))


def find(name: str) -> Entry:
    """Return the entry of a name or alias; ValueError names the valid ones and the nearest."""
    if name in NAMES:
        return LOSSES[ALIASES.get(name, name)]
    raise ValueError(
        f"{name!r} is no loss{nearest(name, NAMES)}; expected one of {', '.join(NAMES)}, or module:function"
    )


def needs_teacher(name: str) -> bool:
    """Whether a loss compares with a teacher; one's own may, as far as its name says."""
    return ":" in name or find(name).needs_teacher
