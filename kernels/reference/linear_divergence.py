"""The definition of `kernels/linear_divergence.py` in plain PyTorch: any dtype, any device, O(N·V)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from tokenkit.kernels.linear_divergence.settings import DEFAULTS, WHOLE_KINDS, Options
from tokenkit.kernels.reference.linear_logprob import logits
from tokenkit.structs import Head


def adaptive_weight(q_NK: Tensor, p_NK: Tensor, alpha: float) -> Tensor:
    """Return the weight of kl in akl: the gap |q − p| over the head, as a part of the whole gap.

    The tail is the longest run of least likely outcomes whose mass stays below `alpha`; of two outcomes that
    are equally likely, the later one is nearer the tail.
    """
    q_NK, p_NK = q_NK.detach(), p_NK.detach()
    ascending_NK, order_NK = torch.sort(q_NK.flip(1), dim=1, stable=True)
    gap_NK = (ascending_NK - p_NK.flip(1).gather(1, order_NK)).abs()
    in_head_NK = ascending_NK.cumsum(1) >= alpha
    head_N, whole_N = (gap_NK * in_head_NK).sum(1), gap_NK.sum(1)
    return torch.where(whole_N > 0, head_N / whole_N.where(whole_N > 0, 1), 0.5)


def divergence(
    log_p_NK: Tensor, log_q_NK: Tensor, kind: str, *, skew: float = 0.1, alpha: float = 0.5
) -> Tensor:
    """Return value_N between log-probabilities of the same K outcomes: p the student's, q the teacher's."""
    p_NK, q_NK = log_p_NK.exp(), log_q_NK.exp()

    def against(log_a_NK: Tensor, log_b_NK: Tensor) -> Tensor:
        """Σ a (log a − log b), 0 where a is 0."""
        is_zero_NK = log_a_NK == -torch.inf
        difference_NK = log_a_NK.masked_fill(is_zero_NK, 0) - log_b_NK.masked_fill(is_zero_NK, 0)
        return (log_a_NK.exp() * difference_NK).sum(1)

    def mixture(part: float) -> Tensor:
        """log(part q + (1 − part) p)."""
        m_NK = part * q_NK + (1 - part) * p_NK
        return m_NK.log()

    if kind == "kl":
        return against(log_q_NK, log_p_NK)
    if kind == "rkl":
        return against(log_p_NK, log_q_NK)
    if kind == "skl":
        return against(log_q_NK, mixture(skew))
    if kind == "srkl":
        return against(log_p_NK, mixture(1 - skew))
    if kind == "js":
        return (against(log_q_NK, mixture(0.5)) + against(log_p_NK, mixture(0.5))) / 2
    if kind == "akl":
        head_N = adaptive_weight(q_NK, p_NK, alpha)
        return head_N * against(log_q_NK, log_p_NK) + (1 - head_N) * against(log_p_NK, log_q_NK)
    if kind == "abs":
        return (p_NK - q_NK).abs().sum(1)
    if kind == "log_abs":
        return (log_p_NK - log_q_NK).abs().sum(1)
    raise ValueError(f"kind must be one of kl, rkl, skl, srkl, js, akl, abs, log_abs: got {kind!r}")


def _outcomes(z_NV: Tensor, index: Tensor | None, *, full: bool, rest: bool) -> Tensor:
    """Return log-probabilities of the outcomes: all ids, or those of `index` (and the rest as one)."""
    if index is None:
        return z_NV.log_softmax(1)
    if not full:
        return z_NV[:, index].log_softmax(1)
    logp_NV = z_NV.log_softmax(1)
    if not rest:
        return logp_NV[:, index]
    unpaired_V = torch.ones(z_NV.shape[1], dtype=torch.bool, device=z_NV.device)
    unpaired_V[index] = False
    return torch.cat([logp_NV[:, index], logp_NV[:, unpaired_V].logsumexp(1, keepdim=True)], 1)


def linear_divergence(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    kind: str = "kl",
    **options: Unpack[Options],
) -> Tensor:
    """Return the divergence of each row, or Σ row_weight · divergence, its gradient left to autograd.

    Takes the options of `kernels/linear_divergence.py` but `outcomes` and `workspace_bytes`.
    """
    settled: Any = {**DEFAULTS, **options}
    temperature, row_weight_N = settled["temperature"], settled["row_weight_N"]
    z_s_NV = logits(student_ND, student_head, temperature)
    z_t_NW = logits(teacher_NE, teacher_head, temperature * settled["teacher_temperature"])
    rest = settled["rest_as_outcome"]
    full = kind in WHOLE_KINDS or rest
    log_p_NK = _outcomes(z_s_NV, settled["student_index"], full=full, rest=rest)
    log_q_NK = _outcomes(z_t_NW, settled["teacher_index"], full=full, rest=rest)
    if rest:  # where every id is in a pair there is no rest, and 0 log 0 = 0
        both_K = (log_p_NK > -torch.inf).any(0) | (log_q_NK > -torch.inf).any(0)
        log_p_NK, log_q_NK = log_p_NK[:, both_K], log_q_NK[:, both_K]
    value_N = divergence(log_p_NK, log_q_NK, kind, skew=settled["skew"], alpha=settled["alpha"])
    return value_N if row_weight_N is None else (row_weight_N * value_N).sum()
