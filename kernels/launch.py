"""Where Triton may run: on a GPU, or on a CPU inside Triton's interpreter where a test asks for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenkit.kernels.language import HAS_TRITON

T = TypeVar("T")

INTERPRET = False
"""Run Triton kernels on CPU tensors: tests set it, where TRITON_INTERPRET=1 at the first import of triton."""


TORCH_EPILOGUES = False
"""Finish every tile with torch's lines, on a GPU too: `bench/gpu_check.py` does where a kernel is broken."""


def runs_triton(tensor: Tensor) -> bool:
    """Say whether the Triton epilogues take `tensor`; otherwise the same lines of torch do.

    float64 stays with torch: it is there for references, and Triton's epilogues are float32.
    """
    if TORCH_EPILOGUES or not HAS_TRITON or tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or INTERPRET


def low_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return what a tile becomes before it enters a GEMM with `tensor`; `dtype` where GEMMs are of that."""
    return tensor.dtype if tensor.is_cuda or runs_triton(tensor) else dtype


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise where a forward-mode derivative is asked for: custom operations would return 0 for it.

    Raises:
        NotImplementedError: a tensor carries a tangent, as under `torch.func.jvp`.
    """
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "tokenkit's kernels have no forward-mode derivative (torch.func.jvp, jacfwd, dual numbers): "
            "use backward() or torch.autograd.grad"
        )


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the device of `tensor`, whichever is current."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def upload(value: T, device: torch.device) -> T:
    """Return a tensor, or a NamedTuple of them, on `device`; the host does not wait for what it computes.

    A copy out of pageable memory would wait until the device has nothing left to do.
    """
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        if device.type == "cuda" and not value.is_cuda:
            return cast("T", value.pin_memory().to(device, non_blocking=True))
        return cast("T", value.to(device))
    parts = cast("Any", value)
    return cast("T", parts._make(upload(part, device) for part in parts))
