"""What several heads say together of the next token: `operation.py` has the mathematics.

operation   the public function, its checks, what a combination needs
passes      loops over tiles of the vocabulary: sums of every member, of a mean of logits, of what is kept
tile        what is done with kept probabilities: a Triton kernel, and the same lines of torch
bounds      whether a target is the likeliest under a mean of probabilities, without keeping any
"""

from tokenkit.kernels.linear_ensemble.operation import Combination, EnsembleLogprob, linear_ensemble
from tokenkit.kernels.linear_ensemble.passes import Part

__all__ = ["Combination", "EnsembleLogprob", "Part", "linear_ensemble"]
