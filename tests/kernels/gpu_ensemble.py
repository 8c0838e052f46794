"""What only a GPU can show of linear_ensemble; `gpu_checks.py` runs these."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenkit.kernels.linear_ensemble import Part, linear_ensemble
from tokenkit.kernels.reference.linear_ensemble import combined_logp
from tokenkit.structs import Head

if TYPE_CHECKING:
    from tests.kernels.gpu_checks import Sizes

MIB = 2**20
COMBINATIONS = ("mean_prob", "mean_logits", "max")


def _parts(sizes: Sizes, dtype: torch.dtype) -> list[Part]:
    """Return a head with a bias, and a capped one of half the width with ids of its own."""
    torch.manual_seed(0)
    N, D, V, device = sizes.tokens, sizes.hidden, sizes.vocab, sizes.device
    fewer = V - V // 8

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return (by * torch.randn(*shape, device=device)).to(dtype)

    return [
        Part(normal(N, D), Head(normal(V, D, by=4 / D**0.5), normal(V)), 0.6),
        Part(
            normal(N, D // 2),
            Head(normal(fewer, D // 2, by=4 / D**0.5), softcap=8.0),
            0.4,
            torch.randint(fewer, (V,), device=device),
        ),
    ]


def _targets(logp_NV: Tensor) -> Tensor:
    """Return in turn the likeliest, the likeliest but one, and any."""
    best_N2 = logp_NV.topk(2).indices
    target_N = torch.arange(len(logp_NV), device=logp_NV.device) * 97 % logp_NV.shape[1]
    target_N[::3] = best_N2[::3, 0]
    target_N[1::3] = best_N2[1::3, 1]
    return target_N


def check_ensembles_match_float64(sizes: Sizes) -> None:
    """log p to 1e-4, of each head too; who is the likeliest, but where two are within 1e-5 of each other."""
    for dtype, combination in product((torch.bfloat16, torch.float32), COMBINATIONS):
        parts = _parts(sizes, dtype)
        logp_NV, logp_KNV = combined_logp(parts, combination)
        target_N = _targets(logp_NV)
        at_N1 = target_N[:, None]
        logp_N1, members_KN = logp_NV.gather(1, at_N1), logp_KNV[:, torch.arange(len(at_N1)), target_N]
        gap_N = logp_NV.scatter(1, at_N1, -torch.inf).amax(1) - logp_N1[:, 0]
        del logp_NV, logp_KNV
        for budget in (None, 64 * MIB):
            found = linear_ensemble(parts, target_N, combination, workspace_bytes=budget)
            assert found.members_KN is not None
            assert found.is_top1_N is not None
            words = f"{combination} {dtype} workspace {budget}"
            for name, value, truth in (
                ("logp", found.logp_N, logp_N1[:, 0]),
                ("of a head", found.members_KN, members_KN),
            ):
                error = ((value.double() - truth).abs().max() / truth.abs().max()).item()
                assert error <= 1e-4, f"{words}: {name} is off by {error:.1e}"
            wrong = (found.is_top1_N != (gap_N <= 0)) & (gap_N.abs() > 1e-5)
            assert not wrong.any(), f"{words}: is_top1 is wrong in {wrong.sum()} rows"


def check_ensembles_repeat_bit_for_bit(sizes: Sizes) -> None:
    """No atomics."""
    parts = _parts(sizes, torch.bfloat16)
    target_N = torch.arange(sizes.tokens, device=sizes.device)
    for combination in COMBINATIONS:
        first, second = (linear_ensemble(parts, target_N, combination) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other), combination


def check_ensembles_do_not_wait_for_the_device(sizes: Sizes) -> None:
    """Under CUDA's synchronisation alarm."""
    if sizes.device == "cpu":
        return
    small = replace(sizes, tokens=64)
    parts, target_N = _parts(small, torch.bfloat16), torch.arange(64, device=sizes.device)
    for combination, asks in product(COMBINATIONS, (True, False)):
        linear_ensemble(
            parts, target_N, combination, asks_top=asks, asks_members=asks
        )  # kernels compile here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_ensemble(parts, target_N, combination, asks_top=asks, asks_members=asks)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_ensemble_memory(sizes: Sizes) -> None:
    """Above inputs and O(N·D): what the workspace allows, and tiles."""
    if sizes.device == "cpu":
        return
    parts = _parts(replace(sizes, tokens=sizes.large_tokens), torch.bfloat16)
    target_N = torch.arange(sizes.large_tokens, device=sizes.device)
    order_N_D = 4 * sum(part.hidden_ND.numel() for part in parts)
    for combination, budget in product(COMBINATIONS, (256 * MIB, 1024 * MIB)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_ensemble(parts, target_N, combination, workspace_bytes=budget)
        used = torch.cuda.max_memory_allocated() - before - order_N_D
        assert used <= budget + 512 * MIB, f"{combination}: {used / MIB:.0f} MiB of {budget / MIB:.0f}"
