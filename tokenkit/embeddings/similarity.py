"""FOCUS and OMP: a new token as a few tokens that both vocabularies have, chosen in an auxiliary space.

Let a_v be the auxiliary vector of new token v, and o run over the anchors: tokens with the same bytes in both
vocabularies that have a vector.

    FOCUS   weights_v = sparsemax_o(cos(a_v, a_o))                      non-negative, sum to 1
    OMP     weights_v = argmin |a_v − Σ_o w_o a_o|², at most k of them not 0, found greedily: the anchor
            that is most parallel to what is left enters, then all weights are fitted again

and in either case row_v = Σ_o weights_v,o · old row of o, the same weights for input, output and bias. Tokens
without a vector, and OMP's whose vector is 0, are made as by FVT.

Sources: Dobler and de Melo, "FOCUS: Effective Embedding Initialization for Monolingual Specialization of
Multilingual Models", EMNLP 2023, arXiv:2305.14481; Goddard and Fernandes Neto, "Training-Free Tokenizer
Transplantation via Orthogonal Matching Pursuit", arXiv:2506.06607; sparsemax: Martins and Astudillo, ICML
2016. Dimensions: N new tokens of one piece, O anchors, A auxiliary size, K atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from tokenkit.embeddings.auxiliary import Auxiliary
from tokenkit.embeddings.rows import (
    LABELS,
    Matching,
    RowSources,
    copied_ids,
    from_lists,
    need_something,
    write_with,
)

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

WEIGHTED_LABELS = (*LABELS, "weighted_anchors")
PIECE = 256
"""New tokens that are compared with all anchors at once."""
SUPPORT = 1024
"""Anchors among which sparsemax is looked for first; all of them where its support reaches beyond."""

Weigh = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(vectors [N, A], anchors [O, A]) -> anchors' indices [N, K] and weights [N, K], 0 where there is none."""


def anchored_sources(
    old: Tokenizer, new: Tokenizer, matching: Matching, auxiliary: Auxiliary | None, weigh: Weigh
) -> RowSources:
    """Return the sources of all rows, those with a vector by `weigh`.

    Raises:
        ValueError: no auxiliary space, nothing may be copied, or nothing with a vector is shared.
    """
    if auxiliary is None:
        raise ValueError(
            "methods focus and omp compare tokens in an auxiliary space: give a text with --data, or with "
            "--auxiliary-model a model that has the target tokenizer"
        )
    if not matching.same_bytes:
        raise ValueError(
            "methods focus and omp are made of the tokens that both vocabularies have: "
            "convert_by_matching cannot be false"
        )
    need_something(old, new)
    copied = copied_ids(old, new, matching)
    known = auxiliary.is_known_V
    is_same_V = copied.label_V == LABELS.index("same_bytes")
    anchors = np.flatnonzero(is_same_V & known)
    if not len(anchors):
        raise ValueError(
            f"no token that {old} and {new} share has an auxiliary vector: give a longer text, or another "
            "model"
        )
    ids: list[NDArray[np.int64]] = [np.asarray(row, np.int64) for row in copied.ids]
    weights = [np.full(len(row), 1 / max(1, len(row))) for row in ids]
    left = copied.to_make
    anchor_old_O = np.array([copied.ids[i][0] for i in anchors.tolist()])
    anchor_OA = auxiliary.vector_VA[torch.from_numpy(anchors)].float()
    targets = np.array([i for i in left if known[i]], np.int64)
    for piece in (targets[start : start + PIECE] for start in range(0, len(targets), PIECE)):
        index_NK, weight_NK = weigh(auxiliary.vector_VA[torch.from_numpy(piece)].float(), anchor_OA)
        for token_id, index_K, weight_K in zip(piece.tolist(), index_NK, weight_NK, strict=True):
            used = weight_K != 0
            if not used.any():  # a vector of zeros; a row of zeros would draw probability
                continue
            ids[token_id], weights[token_id] = anchor_old_O[index_K[used].numpy()], weight_K[used].numpy()
            copied.label_V[token_id] = WEIGHTED_LABELS.index("weighted_anchors")
    spelled = [i for i in left if not len(ids[i])]
    for token_id, row in zip(
        spelled, write_with(old, [new.token_bytes[i] for i in spelled], copied.by_bytes), strict=True
    ):
        if row:
            ids[token_id], weights[token_id] = np.asarray(row, np.int64), np.full(len(row), 1 / len(row))
            copied.label_V[token_id] = LABELS.index("mean_of_pieces")
    return from_lists(ids, copied.label_V, WEIGHTED_LABELS, weights)


def focus_weights(vector_NA: Tensor, anchor_OA: Tensor) -> tuple[Tensor, Tensor]:
    """Sparsemax of the cosines."""
    cosine_NO = normalize(vector_NA, dim=1) @ normalize(anchor_OA, dim=1).T
    index_NK, weight_NK = sparsemax(cosine_NO, min(SUPPORT, cosine_NO.shape[1]))
    if weight_NK.shape[1] < cosine_NO.shape[1] and bool((weight_NK[:, -1] > 0).any()):
        return sparsemax(cosine_NO, cosine_NO.shape[1])
    return index_NK, weight_NK


def sparsemax(score_NO: Tensor, support: int) -> tuple[Tensor, Tensor]:
    """Return the nearest point of the simplex among the `support` largest scores: indices, weights [N, K].

    It is that of all scores where its last weight is 0.
    """
    score_NK, index_NK = score_NO.topk(support, dim=1)
    rank_K = torch.arange(1, support + 1, dtype=score_NK.dtype)
    excess_NK = score_NK.cumsum(1) - 1
    size_N = (rank_K * score_NK > excess_NK).sum(1, keepdim=True)
    threshold_N = excess_NK.gather(1, size_N - 1) / size_N
    return index_NK, (score_NK - threshold_N).clamp(min=0)


def omp_weights(vector_NA: Tensor, anchor_OA: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit with `num_atoms` anchors, fewer where the space or the anchors are."""
    unit_OA = normalize(anchor_OA, dim=1)
    rows = torch.arange(len(vector_NA))
    is_used_NO = torch.zeros(len(vector_NA), len(anchor_OA), dtype=torch.bool)
    chosen: list[Tensor] = []
    left_NA, weight_NK = vector_NA, torch.zeros(len(vector_NA), 0)
    for _ in range(min(num_atoms, *anchor_OA.shape)):
        match_NO = (left_NA @ unit_OA.T).abs().masked_fill(is_used_NO, -1)
        best_N = match_NO.argmax(1)
        is_used_NO[rows, best_N] = True
        chosen.append(best_N)
        atom_NKA = unit_OA[torch.stack(chosen, 1)].double()
        gram_NKK = atom_NKA @ atom_NKA.mT
        gram_NKK.diagonal(dim1=1, dim2=2).add_(1e-9)  # anchors with the same vector
        target_NK = (atom_NKA @ vector_NA.double()[..., None])[..., 0]
        weight_NK = torch.linalg.solve(gram_NKK, target_NK)
        left_NA = (vector_NA.double() - (weight_NK[:, None] @ atom_NKA)[:, 0]).float()
    index_NK = torch.stack(chosen, 1)
    length_NK = anchor_OA.norm(dim=1).clamp(min=1e-12)[index_NK]
    return index_NK, weight_NK.float() / length_NK
