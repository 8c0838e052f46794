"""The definition of `kernels/sorted_distance.py` in plain PyTorch: by sorting, on any device, O(N·V)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.reference.linear_logprob import logits
from tokenkit.structs import Head


def sorted_distance(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    row_weight_N: Tensor | None = None,
) -> Tensor:
    """Return Σ_r |p_(r) − q_(r)| of each row, or its sum weighted by `row_weight_N`."""
    p_NV = torch.softmax(logits(student_ND, student_head, temperature), -1)
    with torch.no_grad():
        q_NW = torch.softmax(logits(teacher_NE, teacher_head, temperature), -1)
    p_NV, q_NW = (x.sort(-1, descending=True).values for x in (p_NV, q_NW))
    longest = max(p_NV.shape[1], q_NW.shape[1])
    p_NV, q_NW = (torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in (p_NV, q_NW))
    value_N = (p_NV - q_NW).abs().sum(-1)
    return value_N if row_weight_N is None else (row_weight_N * value_N).sum()
