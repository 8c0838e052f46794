"""The tolerance rule of this repository."""

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, in units of the largest true magnitude."""
    if truth.numel() == 0:
        return 0.0
    return ((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def assert_within_budget(name: str, kernel: Tensor, eager: Tensor, truth: Tensor) -> None:
    """A kernel may be at most twice as far from the float64 truth as eager PyTorch in the kernel's dtype.

    One unit of rounding comes on top, because eager is sometimes exact by luck. NaN never passes.
    """
    budget = 2 * relative_error(eager, truth) + torch.finfo(kernel.dtype).eps
    error = relative_error(kernel, truth)
    assert error <= budget, f"{name}: error {error:.2e} is over its budget {budget:.2e}"
