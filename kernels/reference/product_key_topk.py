"""The definition of `kernels/product_key_topk.py` in plain PyTorch: every expert scored, any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_scores(query_NHQ: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """Return the score of every expert, [N, H, Π E_l], row-major."""
    H = query_NHQ.shape[1]
    score: Tensor = query_NHQ.new_zeros(1)
    for part, key in zip(query_NHQ.chunk(len(keys), -1), keys, strict=True):
        found = torch.einsum("nhq,heq->nhe", part, key.expand(H, -1, -1))
        score = (score[..., :, None] + found[..., None, :]).flatten(-2)
    return score


def product_key_topk(
    query_NHQ: Tensor, keys: Sequence[Tensor], K: int, gate: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Return the K best of all experts and their gates, the gradient left to autograd."""
    score, expert = all_scores(query_NHQ, keys).topk(K, -1)
    if gate == "softmax":
        return expert.int(), score.softmax(-1)
    return expert.int(), score.relu() if gate == "relu" else score.sigmoid()
