"""From the inner products of the losses' gradients to what each loss weighs.

    gram[i, j] = <g_i, g_j>            g_j: gradient of loss j over the whole step, before any weight
    gradient of the step = Σ_i w_i h_i,   h_i = Σ_j C[i, j] g_j

gradmag, gradclip and pcgrad make the h_i of the g_j by scaling and adding alone. So the small matrix C says
all that they do, and the gradients themselves are touched once: Σ_j (w C)_j g_j. The approx_ functions are
the same on the gradients of the last transformer layer.

Sources: PCGrad, Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv:2001.06782, algorithm 1;
GradNorm, Chen et al., arXiv:1711.02257, whose weights are trained (`weights.py`).

Dimensions: J losses.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tokenkit.objective.options import Part

ROUNDING = 1e-3  # root of float32's: of a gradient that was projected away, that much may seem to be left


def mixing_matrix(parts: tuple[Part, ...], gram_JJ: Tensor, step: int, is_used_J: Tensor) -> Tensor:
    """Return C [J, J], float64: row i says what becomes of the gradient of loss i.

    A gradient whose norm is not finite makes its row NaN, so that no loss drops out unnoticed.

    Args:
        parts: from `parse_aggregation`.
        gram_JJ: float64, inner products of the gradients of the whole step.
        step: seeds the order of PCGrad's projections: the same on every rank and after a resume.
        is_used_J: bool; losses of weight 0 take no part, and nobody makes way for them.
    """
    used_J = is_used_J.to(gram_JJ.dtype)
    gram_JJ = gram_JJ * used_J[:, None] * used_J
    mix_JJ = torch.eye(len(gram_JJ), dtype=gram_JJ.dtype, device=gram_JJ.device)
    rounding_J = torch.zeros_like(used_J)
    for part in parts:
        now_JJ = mix_JJ @ gram_JJ @ mix_JJ.T
        norm_J = norms(now_JJ)
        if part.name == "pcgrad":
            mix_JJ = _project(now_JJ, step) @ mix_JJ
            rounding_J = ROUNDING * norm_J
        else:
            norm_J = torch.where(norm_J <= rounding_J, 0, norm_J)
            mix_JJ = _scales(part, norm_J)[:, None] * mix_JJ
    return mix_JJ


def norms(gram_JJ: Tensor) -> Tensor:
    """Return the norm of each gradient; rounding may leave a square a hair below 0."""
    return gram_JJ.diagonal().clamp_min(0).sqrt()


def _scales(part: Part, norm_J: Tensor) -> Tensor:
    """Return what each gradient is multiplied by; a gradient of 0 stays 0."""
    if part.name == "gradclip":
        assert part.limit is not None
        scale_J = (part.limit / norm_J).clamp_max(1)
    elif part.name == "gradnorm":
        return torch.ones_like(norm_J)
    else:
        scale_J = torch.where(norm_J > 0, 1 / norm_J, 0)
    if part.name == "approx_gradmag_preserve_mag":
        total = scale_J.sum()
        scale_J = torch.where(total > 0, scale_J / total, scale_J)
    return torch.where(norm_J.isfinite(), scale_J, torch.nan)


def _project(gram_JJ: Tensor, step: int) -> Tensor:
    """Return PCGrad's C: each gradient loses, one after the other, its part against every other one."""
    J = len(gram_JJ)
    shuffle = random.Random(step)
    rows = []
    for i in range(J):
        row_J = torch.zeros_like(gram_JJ[i])
        row_J[i] = 1
        others = [j for j in range(J) if j != i]
        shuffle.shuffle(others)
        for j in others:
            along = row_J @ gram_JJ[:, j]
            conflicts = (along < 0) & (gram_JJ[j, j] > 0)
            row_J[j] -= torch.where(conflicts, along / gram_JJ[j, j], 0)
        rows.append(row_J)
    return torch.stack(rows)
