"""The definition of `kernels/hybrid_distance.py` in plain PyTorch: on any device, O(N·V)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.hybrid_distance import FLOOR, Measure, Pairs
from tokenkit.kernels.reference.linear_logprob import logits
from tokenkit.structs import Head


def hybrid_distance(
    student: tuple[Tensor, Head, Tensor],
    teacher: tuple[Tensor, Head, Tensor],
    row_weight_N: Tensor,
    pairs: Pairs | None = None,
    measure: Measure = Measure(),  # noqa: B008
) -> Tensor:
    """Return Σ row_weight · value, its gradient left to autograd."""
    p_NV, q_NW = (
        torch.softmax(logits(x, head, temperature), -1) * log_scale_N.exp()[:, None]
        for (x, head, log_scale_N), temperature in (
            (student, measure.temperature),
            (teacher, measure.teacher_temperature),
        )
    )
    q_NW = q_NW.detach()
    value_N = torch.zeros_like(row_weight_N)
    if pairs is not None and len(pairs.student_P):
        a_NP, b_NP = p_NV[:, pairs.student_P].clamp_min(FLOOR), q_NW[:, pairs.teacher_P].clamp_min(FLOOR)
        m_NP, beta = measure.beta * b_NP + (1 - measure.beta) * a_NP, measure.beta
        # at 0 and 1 the published loss is one of the two terms, not what the mixture tends to, which is 0
        part_NP = beta * b_NP * (b_NP / m_NP).log() + (1 - beta) * a_NP * (a_NP / m_NP).log()
        if beta == 0:
            part_NP = b_NP * (b_NP / a_NP).log()
        elif beta == 1:
            part_NP = a_NP * (a_NP / b_NP).log()
        value_N = value_N + measure.matched_weight * part_NP.sum(1)
    if pairs is not None:
        p_NV, q_NW = p_NV[:, pairs.student_rest], q_NW[:, pairs.teacher_rest]
    if p_NV.shape[1] and q_NW.shape[1]:
        p_NV, q_NW = (x.sort(-1, descending=True).values for x in (p_NV, q_NW))
        longest = max(p_NV.shape[1], q_NW.shape[1])
        p_NV, q_NW = (torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in (p_NV, q_NW))
        value_N = value_N + measure.unmatched_weight * (p_NV - q_NW).abs().sum(1)
    return (row_weight_N * value_N).sum()
