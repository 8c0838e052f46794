"""What only a GPU can show of linear_divergence; `gpu_checks.py` runs these."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenkit.kernels.linear_divergence import KINDS, linear_divergence, match_outcomes
from tokenkit.kernels.reference.linear_divergence import linear_divergence as reference
from tokenkit.structs import Head

if TYPE_CHECKING:
    from tests.kernels.gpu_checks import Sizes

MIB = 2**20
MODES = ("recompute", "weighted", "rows")


def _inputs(sizes: Sizes, dtype: torch.dtype, N: int) -> tuple[Tensor, ...]:
    """Return student, weight, teacher, teacher's weight (a ninth more rows) and upstream gradients."""
    torch.manual_seed(0)
    D, V, W = sizes.hidden, sizes.vocab, sizes.vocab + sizes.vocab // 9
    made = [
        torch.randn(N, D, device=sizes.device),
        4 * torch.randn(V, D, device=sizes.device) / D**0.5,
        torch.randn(N, D, device=sizes.device),
        4 * torch.randn(W, D, device=sizes.device) / D**0.5,
    ]
    return *(x.to(dtype) for x in made), torch.linspace(0.5, 2, N, device=sizes.device)


def _indices(name: str, sizes: Sizes) -> dict[str, Any]:
    V, W, device = sizes.vocab, sizes.vocab + sizes.vocab // 9, sizes.device
    if name == "map":
        return {"teacher_index": torch.randint(W, (V,), device=device)}
    indices = {f"{side}_index": torch.randint(V, (V // 2,), device=device) for side in ("student", "teacher")}
    return indices | {"rest_as_outcome": name == "rest"}


def _run(
    function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, mode: str, **options: Any
) -> dict[str, Tensor]:
    *tensors, upstream = inputs
    student, weight, teacher, teacher_weight = (x.detach().to(dtype) for x in tensors)
    student.requires_grad_()
    teacher.requires_grad_()
    weight.requires_grad_(mode != "rows")
    softcap = options.pop("softcap", None)
    if mode == "weighted":
        options["row_weight_N"] = upstream
    heads = Head(weight, softcap=softcap), Head(teacher_weight, softcap=softcap)
    value = function(student, heads[0], teacher, heads[1], **options)
    total = value if mode == "weighted" else (value * upstream).sum()
    total.backward()
    found = {
        "value": value.detach(),
        "dstudent": student.grad,
        "dteacher": teacher.grad,
        "dweight": weight.grad,
    }
    return {name: x for name, x in found.items() if x is not None}


def check_divergences_match_float64(sizes: Sizes) -> None:
    """Every kind and mode over a map, and pairs with the rest: values to 1e-5, gradients as rounded.

    A width of 128 lets float32 dW fit a budget that cuts the rows into several groups of chunks.
    """
    narrow = replace(sizes, hidden=min(sizes.hidden, 128))
    budget = {"workspace_bytes": 4 * narrow.hidden * narrow.vocab}
    for dtype, tolerance in ((torch.bfloat16, 6e-3), (torch.float32, 2e-5)):
        inputs = _inputs(narrow, dtype, 4 if sizes.device == "cpu" else 160)
        for kind in KINDS if sizes.device != "cpu" else ("kl", "js", "akl"):
            for outcomes, cap in (("map", None), ("rest", 8.0)):
                options = {"kind": kind, "softcap": cap, "temperature": 1.5, **_indices(outcomes, sizes)}
                truth = _run(reference, inputs, torch.float64, "recompute", **options)
                for mode in MODES:
                    found = _run(linear_divergence, inputs, dtype, mode, **options, **budget)
                    for name, value in found.items():
                        expected = truth[name] if value.ndim else (truth[name] * inputs[-1]).sum()
                        limit = 1e-5 if name == "value" else tolerance
                        error = (value.double() - expected).abs().max() / expected.abs().max()
                        assert error <= limit, (
                            f"{kind} {outcomes} {mode} {dtype}: {name} is off by {error:.1e}"
                        )


def check_divergences_repeat_bit_for_bit(sizes: Sizes) -> None:
    """Repeated ids included: no atomics."""
    inputs = _inputs(sizes, torch.bfloat16, min(sizes.tokens, 64))
    for mode in MODES:
        options = _indices("pairs", sizes)
        first, second = (_run(linear_divergence, inputs, torch.bfloat16, mode, **options) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), mode


def check_divergences_do_not_wait_for_the_device(sizes: Sizes) -> None:
    """Over a map, and over pairs that were matched beforehand."""
    if sizes.device == "cpu":
        return
    student, weight, teacher, teacher_weight, upstream = _inputs(sizes, torch.bfloat16, min(sizes.tokens, 64))
    student.requires_grad_()
    weight.requires_grad_()
    heads = Head(weight), Head(teacher_weight)
    pairs = _indices("pairs", sizes)
    pairs.pop("rest_as_outcome")
    matched = {"outcomes": match_outcomes(*heads, **pairs, whole=True), "rest_as_outcome": True}
    for options in (_indices("map", sizes), matched):
        for weights in (None, upstream):
            options["row_weight_N"] = weights
            linear_divergence(student, heads[0], teacher, heads[1], **options).sum().backward()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                linear_divergence(student, heads[0], teacher, heads[1], **options).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def check_divergence_memory(sizes: Sizes) -> None:
    """1.4 GiB above inputs, outputs and O(N·D), with every gradient recomputed or the head frozen."""
    if sizes.device == "cpu":
        return
    N = sizes.large_tokens
    student, weight, teacher, teacher_weight, _ = _inputs(sizes, torch.bfloat16, N)
    for train_head in (True, False):
        student.grad = weight.grad = None
        student.requires_grad_()
        weight.requires_grad_(train_head)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        index = _indices("map", sizes)
        linear_divergence(student, Head(weight), teacher, Head(teacher_weight), **index).sum().backward()
        used = torch.cuda.max_memory_allocated() - before - train_head * weight.nbytes - 12 * student.numel()
        assert used <= 1.4 * 1024 * MIB, f"a divergence took {used / MIB:.0f} MiB, train_head {train_head}"
