"""The definition of `kernels/peer_experts.py` in plain PyTorch: differentiable, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

ACTS = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "silu": torch.nn.functional.silu}


def peer_experts(
    hidden_ND: Tensor,
    down_EMD: Tensor,
    up_EMD: Tensor,
    expert_NP: Tensor,
    gate_NP: Tensor,
    activation: str = "gelu",
) -> Tensor:
    """Return the sum of each token's experts from all of their rows at once, differentiable."""
    expert_NP = expert_NP.long()
    s_NPM = torch.einsum("nd,npmd->npm", hidden_ND, down_EMD[expert_NP])
    return torch.einsum("np,npm,npmd->nd", gate_NP, ACTS[activation](s_NPM), up_EMD[expert_NP])
