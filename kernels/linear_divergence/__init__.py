"""Divergences of two models' next-token distributions: `operation.py` has the mathematics.

operation   the operation, its derivative, the public function
settings    options, mode, how they travel into the operation;  checks: what is refused
terms       one outcome's part of a value and of its gradient, by kind
outcomes    which ids of two vocabularies face each other;  adaptive_weight: of kind akl
passes      the two ways through the logits;  rows: the numbers of a row;  tile: kernels
"""

from tokenkit.kernels.kinds import KINDS
from tokenkit.kernels.linear_divergence.operation import linear_divergence
from tokenkit.kernels.linear_divergence.outcomes import Outcomes, match_outcomes

__all__ = ["KINDS", "Outcomes", "linear_divergence", "match_outcomes"]
