"""What only a GPU can show of sorted_distance; `gpu_checks.py` runs these."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenkit.kernels.reference.sorted_distance import sorted_distance as reference
from tokenkit.kernels.sorted_distance import error_bound, sorted_distance
from tokenkit.structs import Head

if TYPE_CHECKING:
    from tests.kernels.gpu_checks import Sizes

MIB = 2**20
MODES = ("tables", "formed", "frozen")


def _inputs(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return student, weight, teacher, teacher's weight (an eighth fewer rows), and upstream gradients."""
    torch.manual_seed(0)
    N, D, V = sizes.tokens, sizes.hidden, sizes.vocab
    spread = torch.linspace(1, 5, N, device=sizes.device)[:, None]
    made = [
        spread * torch.randn(N, D, device=sizes.device),
        torch.randn(V, D, device=sizes.device) / D**0.5,
        spread * torch.randn(N, D, device=sizes.device),
        torch.randn(V - V // 8, D, device=sizes.device) / D**0.5,
    ]
    return *(x.to(dtype) for x in made), torch.linspace(0.5, 2, N, device=sizes.device)


def _run(
    function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, mode: str, **options: Any
) -> dict[str, Tensor]:
    student, weight, teacher, teacher_weight = (x.detach().to(dtype) for x in inputs[:4])
    student.requires_grad_()
    weight.requires_grad_(mode != "frozen")
    if mode == "formed":
        options["row_weight_N"] = inputs[4].to(torch.promote_types(dtype, torch.float32))
    value = function(student, Head(weight), teacher, Head(teacher_weight), **options)
    (value if mode == "formed" else (inputs[4] * value).sum()).backward()
    found = {"value": value.detach(), "dstudent": student.grad}
    return found if mode == "frozen" else found | {"dweight": weight.grad}


def check_sorted_distances_match_float64(sizes: Sizes) -> None:
    """Sorted: to rounding. Binned: values within the bound, gradients but for ranks that nearly tie."""
    for dtype, rounding in ((torch.bfloat16, 6e-3), (torch.float32, 5e-5)):
        inputs = _inputs(sizes, dtype)
        truth = _run(reference, inputs, torch.float64, "tables")
        heads = Head(inputs[1]), Head(inputs[3])
        bound_N = error_bound(inputs[0], heads[0], inputs[2], heads[1]).double()
        for exact in (True, False):
            for mode in MODES:
                found = _run(sorted_distance, inputs, dtype, mode, exact=exact)
                if mode != "formed":
                    error_N = truth["value"] - found["value"]
                    assert (error_N >= -5e-5).all(), f"{mode} {dtype}: {error_N.min():.1e} too large"
                    room_N = 5e-5 + (0 if exact else bound_N)
                    assert (error_N <= room_N).all(), f"{mode} {dtype}: {error_N.max():.1e} too small"
                for name in found.keys() - {"value"}:
                    error = ((found[name].double() - truth[name]).norm() / truth[name].norm()).item()
                    limit = rounding if exact else rounding + 0.1
                    assert error <= limit, f"{mode} {dtype} exact {exact}: {name} is off by {error:.1e}"


def check_sorted_distances_repeat_bit_for_bit(sizes: Sizes) -> None:
    """The atomics add integers: which program comes first moves nothing."""
    inputs = _inputs(sizes, torch.bfloat16)
    for mode in MODES:
        first, second = (_run(sorted_distance, inputs, torch.bfloat16, mode, exact=False) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), mode


def check_sorted_distances_do_not_wait_for_the_device(sizes: Sizes) -> None:
    """Forward and backward under CUDA's synchronisation alarm."""
    if sizes.device == "cpu":
        return
    inputs = _inputs(replace(sizes, tokens=64), torch.bfloat16)
    for mode in MODES:
        _run(sorted_distance, inputs, torch.bfloat16, mode, exact=False)  # kernels compile here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _run(sorted_distance, inputs, torch.bfloat16, mode, exact=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_sorted_distance_memory(sizes: Sizes) -> None:
    """Above inputs, gradients, O(N·D) and 3 KB a row: what the workspace allows."""
    if sizes.device == "cpu":
        return
    big = replace(sizes, tokens=sizes.large_tokens)
    student, weight, teacher, teacher_weight, upstream = _inputs(big, torch.bfloat16)
    student.requires_grad_()
    for budget in (256 * MIB, 1024 * MIB):
        for train_head in (False, True):
            weight.requires_grad_(train_head)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            value = sorted_distance(
                student, Head(weight), teacher, Head(teacher_weight),
                row_weight_N=upstream, workspace_bytes=budget,
            )  # fmt: skip
            value.backward()
            used = torch.cuda.max_memory_allocated() - before - train_head * weight.nbytes
            used -= 12 * student.numel() + 4096 * len(student)
            student.grad = weight.grad = None
            assert used <= budget + 64 * MIB, f"{used / MIB:.0f} MiB of {budget / MIB:.0f}, head {train_head}"
