"""Log-probabilities of targets and of a subset of the vocabulary: `operation.py` has the mathematics.

operation   the operation in three modes, its derivative, the public function, its checks
plan        what a call computes: mode, subset, tiles, targets; the statistics of a row
tiled       a loop over tiles of logits, and what is done with one
fused       without a workspace;  programs: its kernels
"""

from tokenkit.kernels.linear_logprob.operation import DEFAULT_WORKSPACE_BYTES, LinearLogprob, linear_logprob
from tokenkit.kernels.linear_logprob.plan import IGNORE, Subset, split_vocabulary

__all__ = [
    "DEFAULT_WORKSPACE_BYTES",
    "IGNORE",
    "LinearLogprob",
    "Subset",
    "linear_logprob",
    "split_vocabulary",
]
