"""`linear_ensemble` in plain PyTorch, in float64: logits of every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenkit.kernels.linear_ensemble.passes import Part


def combined_logp(parts: Sequence[Part], combination: str) -> tuple[Tensor, Tensor]:
    """Return log p of every id to the ensemble, and to each head: float64 [N, V] and [K, N, V]."""
    V = len(parts[0].head.weight_VD) if parts[0].head.vocab_size is None else parts[0].head.vocab_size
    logits = []
    for hidden_ND, head, _, ids_V in parts:
        bias_V = 0 if head.bias_V is None else head.bias_V.double()
        z_NW = head.scale * (hidden_ND.double() @ head.weight_VD.double().T + bias_V)
        if head.softcap is not None:
            z_NW = head.softcap * torch.tanh(z_NW / head.softcap)
        logits.append(z_NW[:, :V] if ids_V is None else z_NW[:, ids_V])
    z_KNV = torch.stack(logits)
    logp_KNV = z_KNV.log_softmax(-1)
    weight_K11 = torch.tensor([part.weight for part in parts], dtype=torch.float64)[:, None, None]
    if combination == "mean_prob":
        return (logp_KNV + weight_K11.log()).logsumexp(0), logp_KNV
    if combination == "mean_logits":
        return (z_KNV * weight_K11).sum(0).log_softmax(-1), logp_KNV
    return logp_KNV.amax(0).log_softmax(-1), logp_KNV
