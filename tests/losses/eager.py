"""The losses on full logits: every kernel replaced by its definition in plain PyTorch."""

from __future__ import annotations

import torch

from tokenkit.kernels.linear_logprob import Subset
from tokenkit.kernels.reference import alm_difference as difference
from tokenkit.kernels.reference import hybrid_distance as hybrid
from tokenkit.kernels.reference import linear_divergence as divergence
from tokenkit.kernels.reference import linear_logprob as logprob
from tokenkit.kernels.reference import projected_divergence as projected
from tokenkit.kernels.reference import sorted_distance as distance
from tokenkit.losses import alm, dskd, gold, gold_js, score, side_path, uld, xtoken

PAIRS = "student_index", "teacher_index"


def linear_logprob(hidden_ND, head, target_N, *, subset_V=None, temperature=1.0, workspace_bytes=0):
    """The definition, for a mask or what `split_vocabulary` made of it."""
    mask_V = subset_V.inside_V if isinstance(subset_V, Subset) else subset_V
    return logprob.linear_logprob(hidden_ND, head, target_N, subset_V=mask_V, temperature=temperature)


def linear_divergence(*args, workspace_bytes=0, outcomes=None, **options):
    """The definition; `paired_outcomes` was made to hand the pairs through."""
    return divergence.linear_divergence(*args, **(outcomes or {}), **options)


def sorted_distance(*args, workspace_bytes=0, exact=True, **options):
    """The definition, by sorting."""
    return distance.sorted_distance(*args, **options)


def projected_divergence(
    student_ND, head, teacher_NE, teacher_head, projection, row_weight_N, *, workspace_bytes=0, **options
):
    """The definition, on a dense projection."""
    carry_WV = projection.dense()
    value_N = projected.projected_divergence(student_ND, head, teacher_NE, teacher_head, carry_WV, **options)
    return (row_weight_N * value_N).sum()


def chunk_likelihood(logp_BL, spans, append_BC=None):
    """Sums over a dense token-by-chunk matrix."""
    C = spans.start_BC.shape[1]
    member_BLC = torch.nn.functional.one_hot(spans.slot_BL, C + 1)[..., :C].to(logp_BL.dtype)
    total_BC = (logp_BL[:, None] @ member_BLC)[:, 0].clamp_max(0)
    return total_BC if append_BC is None else total_BC + append_BC


def use(monkeypatch) -> None:
    """Replace the kernels in every loss."""
    for module in (score, dskd, gold, gold_js):
        monkeypatch.setattr(module, "linear_logprob", linear_logprob)
    for module in (uld, gold_js):
        monkeypatch.setattr(module, "sorted_distance", sorted_distance)
    for module in (uld, gold):
        monkeypatch.setattr(module, "hybrid_distance", hybrid.hybrid_distance)
    monkeypatch.setattr(score, "linear_divergence", linear_divergence)
    for module in (side_path, gold_js):
        monkeypatch.setattr(
            module, "paired_outcomes", lambda *given, whole: dict(zip(PAIRS, given, strict=False))
        )
    monkeypatch.setattr(xtoken, "projected_divergence", projected_divergence)
    monkeypatch.setattr(alm, "alm_difference", difference.alm_difference)
    monkeypatch.setattr(alm, "chunk_likelihood", chunk_likelihood)
