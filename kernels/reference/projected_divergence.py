"""The definition of `kernels/projected_divergence.py` in plain PyTorch: any dtype, any device, O(N·V)."""

from __future__ import annotations

from torch import Tensor

from tokenkit.kernels.reference.linear_logprob import logits
from tokenkit.structs import Head


def projected_divergence(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    projection_WV: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Return the KL of each row, its gradient left to autograd; `projection_WV` is dense."""
    reached_W = (projection_WV > 0).any(1)
    p_NV = logits(student_ND, student_head, temperature).softmax(1)
    r_NW = (p_NV @ projection_WV.T)[:, reached_W]
    r_NW = r_NW / r_NW.sum(1, keepdim=True)
    z_NW = logits(teacher_NE, teacher_head, temperature * teacher_temperature)[:, reached_W]
    log_q_NW = z_NW.log_softmax(1)
    return (log_q_NW.exp() * (log_q_NW - r_NW.log())).sum(1)
