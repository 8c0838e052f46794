"""The names that a configuration may use, without importing what they name.

`tests/test_config_names.py` holds them against `tokenkit.losses.LOSSES` and its relatives.
"""

from typing import Literal, get_args

LossName = Literal[
    "clm",
    "sft",
    "alm_unconstrained",
    "alm_greedy",
    "alm_space",
    "alm_unbiased",
    "alm",
    "alm_side_path",
    "alm_latents",
    "baseline_uld",
    "baseline_mined",
    "baseline_minED",
    "baseline_dskd",
    "baseline_gold",
    "baseline_gold_js",
    "baseline_xtoken",
]
LOSS_NAMES: tuple[str, ...] = get_args(LossName)
LOSS_ALIASES = {
    "sft": "clm",
    "alm_greedy": "alm_unconstrained",
    "alm": "alm_unbiased",
    "baseline_minED": "baseline_mined",
}

LOSSES_WITHOUT_TEACHER = ("clm", "sft")

Difference = Literal[
    "abs",
    "binary_ce",
    "reverse_binary_kl",
    "binary_kl_temp_limit",
    "abs_exp",
    "renyi",
    "joschu_k2",
    "joschu_k3",
]

Divergence = Literal["kl", "rkl", "skl", "srkl", "js", "akl"]
MergeStrategy = Literal["observed", "bayesian"]

ALM_MODES = ("append_space", "merge_by_space_prob", "eos_as_space", "none")
SPACE_MASK_PARTS = ("space", "tab", "newline", "special")

AGGREGATIONS = (
    "gradmag", "gradclip", "pcgrad", "gradnorm", "approx_gradmag", "approx_gradmag_preserve_mag",
)  # fmt: skip

Numerator = Literal["chunk_count", "token_count", "log1p_token_count"]
Denominator = Literal["chunk_count", "token_count"]

ChatTemplateMode = Literal[
    "surround_instruct",
    "direct_encode",
    "direct_encode_no_force_eos",
    "direct_encode_no_force_bos",
    "direct_encode_no_force_bos_no_force_eos",
]
LossMaskMode = Literal["assistant", "all"]
SpecialTokensMode = Literal["identity", "ignore", "ignore_pad"]
PrefixTrainable = Literal["non_overlapping_embeddings", "embeddings", "all"]

ZettMethod = Literal["fvt", "mean", "overlap", "random_normal", "omp", "focus", "hypernet"]
Dtype = Literal["float32", "float16", "bfloat16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
LearningRateSchedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear_warmup_constant",
    "linear",
    "cosine",
    "linear_warmup_cosine_decay",
    "linear_warmup_linear_decay",
]
