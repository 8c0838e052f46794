"""What only a GPU can show, as plain functions: pytest runs them, and so does a machine without pytest.

    python -m tests.kernels.gpu_checks              on a GPU, real sizes
    python -m tests.kernels.gpu_checks --dry-run    on a CPU, tiny sizes: shows that the checks run

Each takes `Sizes` and raises AssertionError. No check loosens a number to pass.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.kernels.gpu_divergence import (  # noqa: F401
    check_divergence_memory,
    check_divergences_do_not_wait_for_the_device,
    check_divergences_match_float64,
    check_divergences_repeat_bit_for_bit,
)
from tests.kernels.gpu_ensemble import (  # noqa: F401
    check_ensemble_memory,
    check_ensembles_do_not_wait_for_the_device,
    check_ensembles_match_float64,
    check_ensembles_repeat_bit_for_bit,
)
from tests.kernels.gpu_sorted import (  # noqa: F401
    check_sorted_distance_memory,
    check_sorted_distances_do_not_wait_for_the_device,
    check_sorted_distances_match_float64,
    check_sorted_distances_repeat_bit_for_bit,
)
from tests.losses.example import make_batch, make_states
from tokenkit.kernels.alm_difference import DIFFERENCES
from tokenkit.kernels.linear_logprob import IGNORE, LinearLogprob, linear_logprob
from tokenkit.kernels.reference.linear_logprob import linear_logprob as reference
from tokenkit.losses import alm_loss, make_loss
from tokenkit.structs import Batch, Head, HiddenStates

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Sizes of a check."""

    device: str = "cuda"
    tokens: int = 512
    vocab: int = 128_256
    hidden: int = 1024
    large_tokens: int = 8192
    large_hidden: int = 4096


TINY = Sizes("cpu", tokens=24, vocab=300, hidden=32, large_tokens=64, large_hidden=32)


def _inputs(sizes: Sizes, dtype: torch.dtype, *, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.hidden, device=sizes.device).to(dtype)
    weight = (scale * torch.randn(sizes.vocab, sizes.hidden, device=sizes.device) / sizes.hidden**0.5).to(
        dtype
    )
    target = torch.randint(sizes.vocab, (sizes.tokens,), device=sizes.device)
    target[::8] = IGNORE
    return hidden, weight, target, torch.rand(sizes.vocab, device=sizes.device) < 0.35


def _gradients(
    function: Callable[..., LinearLogprob],
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    *,
    frozen: bool = False,
    **options: object,
) -> dict[str, Tensor]:
    hidden, weight, target, subset = inputs
    hidden = hidden.to(dtype).detach().requires_grad_()
    weight = weight.to(dtype).detach().requires_grad_(not frozen)
    head = Head(weight, softcap=options.pop("softcap", None))
    result = function(hidden, head, target, subset_V=subset, **options)
    upstream = torch.linspace(0.5, 2, 2 * len(hidden), device=hidden.device).view(2, -1)
    ((result.logp_N * upstream[0]).sum() + (result.subset_logp_N * upstream[1]).sum()).backward()
    found = {"logp": result.logp_N, "mass": result.subset_logp_N, "dhidden": hidden.grad}
    return found if frozen else found | {"dweight": weight.grad}


MODES = {
    "recompute": {"workspace_bytes": 16 * MIB},
    "cached": {"workspace_bytes": 1 << 36},
    "frozen": {"frozen": True},
    "fused": {"workspace_bytes": 0},
    "fused frozen": {"workspace_bytes": 0, "frozen": True},
}


def check_every_mode_matches_float64(sizes: Sizes) -> None:
    """logp to 1e-4; gradients to the rounding of 16 bits, or of float32."""
    for dtype, tolerance in ((torch.bfloat16, 6e-3), (torch.float16, 2e-3), (torch.float32, 2e-5)):
        for cap in (None, 8.0):
            inputs = _inputs(sizes, dtype)
            truth = _gradients(reference, inputs, torch.float64, softcap=cap)
            for mode, options in MODES.items():
                found = _gradients(linear_logprob, inputs, dtype, softcap=cap, **options)
                for name, value in found.items():
                    limit = 1e-4 if name in ("logp", "mass") else tolerance
                    error = ((value.double() - truth[name]).abs().max() / truth[name].abs().max()).item()
                    assert error <= limit, f"{mode} {dtype} cap {cap}: {name} is off by {error:.1e}"


def check_ragged_vocabularies_and_odd_row_counts(sizes: Sizes) -> None:
    """Sizes that divide nothing, and a vocabulary smaller than a tile."""
    for tokens, vocab in ((1, 5), (7, 33), (33, 4097), (129, 20_011)):
        odd = replace(sizes, tokens=max(tokens, 4), vocab=min(vocab, sizes.vocab), hidden=40)
        inputs = _inputs(odd, torch.bfloat16)
        inputs[3][0] = True
        truth = _gradients(reference, inputs, torch.float64)
        for mode, options in MODES.items():
            found = _gradients(linear_logprob, inputs, torch.bfloat16, **options)
            for name, value in found.items():
                error = ((value.double() - truth[name]).abs().max() / truth[name].abs().max()).item()
                assert error <= 6e-3, f"{mode} {odd.tokens}x{odd.vocab}: {name} is off by {error:.1e}"


def check_a_run_repeats_bit_for_bit(sizes: Sizes) -> None:
    """No atomics, no order that depends on the machine's mood."""
    inputs = _inputs(sizes, torch.bfloat16)
    for mode, options in MODES.items():
        first, second = (_gradients(linear_logprob, inputs, torch.bfloat16, **options) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), mode


def _on(batch: Batch, states: list[HiddenStates], device: str) -> tuple[Batch, list[HiddenStates]]:
    moved = [
        HiddenStates(
            x.hidden_BTD.detach().to(device, torch.float32).requires_grad_(),
            Head(x.head.weight_VD.detach().to(device, torch.float32).requires_grad_()),
        )
        for x in states
    ]
    return batch.to(device), moved


def check_alm_is_the_same_on_the_device(sizes: Sizes) -> None:
    """Every difference, float32 on the device against float64 on the CPU."""
    for kind in DIFFERENCES:
        batch = make_batch()
        student, teacher = make_states(batch)
        options = {"diff": kind, "space_threshold": 0.4, "binarization_temp": 5.0}
        truth = alm_loss(student, teacher, batch, **options)
        truth.total.backward()
        moved, (student_there, teacher_there) = _on(batch, [student, teacher], sizes.device)
        term = alm_loss(student_there, teacher_there, moved, **options)
        term.total.backward()
        assert term.count.item() == truth.count.item(), kind
        for value, expected in (
            (term.total, truth.total),
            (student_there.hidden_BTD.grad, student.hidden_BTD.grad),
            (student_there.head.weight_VD.grad, student.head.weight_VD.grad),
        ):
            error = (value.detach().cpu().double() - expected.detach()).abs().max() / expected.abs().max()
            assert error <= 2e-5, f"{kind}: off by {error:.1e}"


def check_the_students_half_never_waits_for_the_device(sizes: Sizes) -> None:
    """Forward and backward of the student's half under CUDA's synchronisation alarm."""
    batch = make_batch()
    moved, (student, teacher) = _on(batch, make_states(batch), sizes.device)
    loss = make_loss("alm_unconstrained")
    prepared = loss.prepare(teacher, moved)
    if sizes.device == "cpu":
        return
    loss.loss(student, prepared, moved).total.backward()  # kernels compile here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.loss(student, prepared, moved).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_memory_claims(sizes: Sizes) -> None:
    """Above inputs, outputs and O(N·D): 64 MiB for log-probabilities, 0.35 GiB for a student's step."""
    if sizes.device == "cpu":
        return
    big = replace(sizes, tokens=sizes.large_tokens, hidden=sizes.large_hidden)
    hidden, weight, target, subset = _inputs(big, torch.bfloat16)
    order_N_D = 4 * hidden.numel()  # the float32 sum of dX, or a frozen head's mean
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_logprob(hidden, Head(weight), target, subset_V=subset)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 64 * MIB, f"log-probabilities took {used / MIB:.0f} MiB"

    hidden.requires_grad_()
    weight.requires_grad_()
    for name, budget, limit in (("a tile", 160 * MIB, 0.35 * 1024 * MIB), ("no workspace", 0, 64 * MIB)):
        torch.cuda.reset_peak_memory_stats()
        hidden.grad = weight.grad = None
        result = linear_logprob(hidden, Head(weight), target, subset_V=subset, workspace_bytes=budget)
        (result.logp_N.sum() + result.subset_logp_N.sum()).backward()
        used = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes - order_N_D
        assert used <= limit, f"a student's step with {name} took {used / MIB:.0f} MiB"


def check_without_workspace_widths_that_fit_and_do_not(sizes: Sizes) -> None:
    """One-pass means up to D = 256, gradients in registers up to 1024, the loop beyond; odd sizes in each."""
    for hidden, vocab, tokens in ((64, 4097, 129), (256, 20_011, 33), (1024, 5003, 200), (2048, 3001, 65)):
        odd = replace(sizes, tokens=tokens, vocab=min(vocab, sizes.vocab), hidden=min(hidden, sizes.hidden))
        for dtype, tolerance in ((torch.bfloat16, 6e-3), (torch.float32, 2e-5)):
            inputs = _inputs(odd, dtype)
            truth = _gradients(reference, inputs, torch.float64, softcap=20.0)
            for mode in ("fused", "fused frozen"):
                found = _gradients(linear_logprob, inputs, dtype, softcap=20.0, **MODES[mode])
                for name, value in found.items():
                    limit = 1e-4 if name in ("logp", "mass") else tolerance
                    error = ((value.double() - truth[name]).abs().max() / truth[name].abs().max()).item()
                    assert error <= limit, f"{mode} {odd.hidden} {dtype}: {name} is off by {error:.1e}"


def check_kernels_launch_where_their_tensors_are(sizes: Sizes) -> None:
    """Tensors on the last GPU while the first is current."""
    last = torch.cuda.device_count() - 1
    if sizes.device == "cpu" or last < 1:
        return
    there = replace(sizes, device=f"cuda:{last}", tokens=32, vocab=1000, hidden=64)
    with torch.cuda.device(0):
        check_a_run_repeats_bit_for_bit(there)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    sizes = TINY if "--dry-run" in sys.argv else Sizes()
    failed = 0
    for check in CHECKS:
        try:
            check(sizes)
            print(f"ok      {check.__name__}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"FAILED  {check.__name__}: {error}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
