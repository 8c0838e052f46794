"""Kernel tests run through Triton's interpreter where there is no GPU, over memory full of NaN."""

import pytest
import torch

from tests import bf16_shim
from tokenkit.kernels import launch

if not torch.cuda.is_available():
    bf16_shim.install()  # for all, not from the first test on that asks for Triton


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, so that an element nobody wrote is seen."""
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(params=["torch", "triton"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> str:
    """Which epilogues run: torch's on a CPU tensor, or Triton's (on a GPU, or interpreted)."""
    if request.param == "triton" and device == "cpu":
        monkeypatch.setattr(launch, "INTERPRET", True)
    if request.param == "torch" and device == "cuda":
        pytest.skip("on a GPU the epilogues are Triton's")
    return request.param
