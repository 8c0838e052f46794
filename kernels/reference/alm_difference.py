"""The definition of `kernels/alm_difference.py` in plain PyTorch: differentiable, any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp x) for x < 0, accurate near 0 and far below it (Mächler 2012)."""
    near = x > -math.log(2)
    return torch.where(
        near, torch.log(-torch.expm1(x.where(near, -1))), torch.log1p(-x.where(~near, -1).exp())
    )


def alm_difference(
    teacher: Tensor,
    student: Tensor,
    kind: str = "binary_ce",
    *,
    temperature: float = 100.0,
    renyi_alpha: float = 0.5,
) -> Tensor:
    """Return d(t, s) from the formulas, its gradient left to autograd."""
    t, s = teacher.detach(), student
    if kind in ("binary_kl_temp_limit", "renyi"):
        u, v = t - EPS, s - EPS
    else:
        u, v = t / temperature - EPS, s / temperature - EPS
    r = (t - s) / temperature
    p, q, alpha = u.exp(), v.exp(), renyi_alpha
    definitions = {
        "abs": lambda: (t - s).abs(),
        "binary_ce": lambda: -(p * v + (1 - p) * log1mexp(v)),
        "reverse_binary_kl": lambda: q * (v - u) + (1 - q) * (log1mexp(v) - log1mexp(u)),
        "binary_kl_temp_limit": lambda: (u - v) + u * torch.log(-v) - u * torch.log(-u),
        "abs_exp": lambda: (p - q).abs(),
        "renyi": lambda: (
            torch.logaddexp(alpha * u + (1 - alpha) * v, alpha * log1mexp(u) + (1 - alpha) * log1mexp(v))
            / (alpha - 1)
        ),
        "joschu_k2": lambda: r.square() / 2,
        "joschu_k3": lambda: torch.expm1(r) - r,
    }
    return definitions[kind]()
