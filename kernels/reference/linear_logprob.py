"""The definition of `kernels/linear_logprob.py` in plain PyTorch: any dtype, any device, O(N·V)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.linear_logprob import IGNORE, LinearLogprob
from tokenkit.structs import Head


def logits(hidden_ND: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """Return softcap(scale · (hidden · weightᵀ + bias)) / temperature, padding rows left out."""
    V = head.weight_VD.shape[0] if head.vocab_size is None else head.vocab_size
    z_NV = hidden_ND @ head.weight_VD[:V].T
    if head.bias_V is not None:
        z_NV = z_NV + head.bias_V[:V]
    z_NV = z_NV * head.scale
    if head.softcap is not None:
        z_NV = head.softcap * torch.tanh(z_NV / head.softcap)
    return z_NV / temperature


def linear_logprob(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    *,
    subset_V: Tensor | None = None,
    temperature: float = 1.0,
) -> LinearLogprob:
    """Return log p(target), log p(subset), whether the target is on top, and the log-sum-exp."""
    z_NV = logits(hidden_ND, head, temperature)
    scored_N = target_N != IGNORE
    index_N1 = target_N.where(scored_N, 0)[:, None]
    lse_N = z_NV.logsumexp(-1)
    z_target_N = z_NV.gather(-1, index_N1)[:, 0]
    subset_logp_N = None
    if subset_V is not None:
        inside_V = torch.nn.functional.pad(subset_V, (0, z_NV.shape[1] - len(subset_V)))
        subset_logp_N = z_NV.masked_fill(~inside_V, -torch.inf).logsumexp(-1) - lse_N
    is_top1_N = scored_N & (z_target_N == z_NV.max(-1).values)
    return LinearLogprob((z_target_N - lse_N).where(scored_N, 0), subset_logp_N, is_top1_N, lse_N)
