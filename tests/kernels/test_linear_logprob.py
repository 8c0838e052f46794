"""linear_logprob against its float64 definition, in every mode, through torch's and Triton's epilogues.

Faults tried, each caught by a test here: the running maximum not updated across tiles; the sum not
rescaled when it rises; the frozen head's accumulator not rescaled; the target's column off by one tile;
dz at the target left as −a p; the target kept in the frozen accumulator; one part's factor given to both;
a kept tile overwritten by the first backward; the softcap's slope dropped; α dropped from the gradient;
a mask dropped in either kernel; ignored rows pulling; padding rows counted; bias gradient not written.
"""

import pytest
import torch

from tests.budget import assert_within_budget
from tokenkit.kernels import linear_logprob as module
from tokenkit.kernels import logprob_tile
from tokenkit.kernels.linear_logprob import IGNORE, linear_logprob
from tokenkit.kernels.reference import linear_logprob as reference
from tokenkit.structs import Head

CACHED, RECOMPUTE = 1 << 30, 0
SHAPES = [
    (1, 1, 1),  # nothing to tile
    (7, 33, 16),  # odd everywhere: three tiles, the last one of a single column
    (16, 64, 32),  # exact multiples
    (33, 65, 24),  # one past everything
]
NAMES = ("logp", "subset_logp", "is_top1", "lse", "dhidden", "dweight", "dbias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 columns in programs of 8, so that small shapes cross every boundary."""
    monkeypatch.setattr(module, "COLUMNS", (16, 16))
    monkeypatch.setattr(logprob_tile, "BLOCK_V", 8)
    monkeypatch.setattr(logprob_tile, "BLOCK_D", 16)


def make(N, V, D, device, *, scale=1.0, bias=True, subset=True):
    """Return hidden, weight, bias, target (one row ignored), subset mask, and unequal upstream gradients."""
    hidden = torch.randn(N, D, device=device)
    weight = scale * torch.randn(V, D, device=device) / D**0.5
    bias_V = torch.randn(V, device=device) if bias else None
    target = torch.randint(V, (N,), device=device)
    if N > 1:
        target[N // 2] = IGNORE
    mask = torch.rand(V, device=device) < 0.4
    mask[V // 2] = True
    return hidden, weight, bias_V, target, mask if subset else None, torch.rand(3, N, device=device)


def run(function, dtype, inputs, *, frozen=False, head=None, **options):
    """Return the results by NAMES of `function` on copies of the inputs in `dtype`."""
    hidden, weight, bias, target, mask, upstream = inputs
    hidden = hidden.detach().to(dtype).requires_grad_()
    weight = weight.detach().to(dtype).requires_grad_(not frozen)
    bias = None if bias is None else bias.detach().to(dtype).requires_grad_(not frozen)
    result = function(hidden, Head(weight, bias, **(head or {})), target, subset_V=mask, **options)
    terms = (result.logp_N, result.subset_logp_N, result.lse_N)
    total = sum((u * x).sum() for u, x in zip(upstream, terms, strict=True) if x is not None)
    total.backward()
    values = [*result, hidden.grad, weight.grad, None if bias is None else bias.grad]
    return {name: x.detach() for name, x in zip(NAMES, values, strict=True) if x is not None}


def assert_like_eager(dtype, inputs, **options):
    workspace_bytes = options.pop("workspace_bytes", RECOMPUTE)
    rounded = tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and i < 3 else x for i, x in enumerate(inputs)
    )
    kernel = run(linear_logprob, dtype, rounded, workspace_bytes=workspace_bytes, **options)
    eager = run(reference.linear_logprob, dtype, rounded, **options)
    truth = run(reference.linear_logprob, torch.float64, rounded, **options)
    assert kernel.keys() == truth.keys()
    for name, value in truth.items():
        if name != "is_top1":
            assert_within_budget(name, kernel[name], eager[name], value)
    assert torch.equal(kernel["is_top1"], truth["is_top1"])


MODES = pytest.mark.parametrize(
    "mode",
    [
        {"workspace_bytes": RECOMPUTE},
        {"workspace_bytes": CACHED},
        {"frozen": True},
    ],
    ids=["recompute", "cached", "frozen"],
)


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@MODES
def test_matches_float64(mode, N, V, D, dtype, scale, executor, device):
    assert_like_eager(dtype, make(N, V, D, device, scale=scale), **mode)
