"""The names of the kinds that kernels have, and what is known of each without loading torch."""

from typing import Literal, get_args

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
"""Of the likelihoods of a chunk: `alm_difference`."""

Divergence = Literal["kl", "rkl", "skl", "srkl", "js", "akl"]
"""Of two distributions: `linear_divergence`."""

Gate = Literal["softmax", "relu", "sigmoid"]
"""What becomes of the scores of a head's experts: `product_key_topk`."""

Activation = Literal["gelu", "relu", "silu"]
"""Of an expert's neurons: `peer_experts`."""

DIFFERENCES: tuple[Difference, ...] = get_args(Difference)
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
KINDS = (*DIVERGENCES, "abs", "log_abs")
"""What `linear_divergence` sums: divergences, and differences of probabilities."""
GATES: tuple[Gate, ...] = get_args(Gate)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

WHOLE_KINDS = ("abs", "log_abs")
"""Those that compare probabilities under the full vocabularies, whatever is paired."""

MIXED = ("skl", "srkl")
"""Those of which one model's gradient is that of skl."""

MIRROR = {"kl": "rkl", "rkl": "kl", "skl": "srkl", "srkl": "skl"}
"""What each becomes when student and teacher change places; others stay."""

INFINITE = {"kl": (0,), "rkl": (1,), "akl": (0, 1), "log_abs": (0, 1)}
"""By kind, the models (0 student, 1 teacher) whose mass may not be 0 where the other's is not."""
