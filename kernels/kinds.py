"""The names of differences and divergences, for those who must know them without loading torch."""

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

DIFFERENCES: tuple[Difference, ...] = get_args(Difference)
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
KINDS = (*DIVERGENCES, "abs", "log_abs")
"""What `linear_divergence` sums: divergences, and differences of probabilities."""
