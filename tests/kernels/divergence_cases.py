"""Inputs of linear_divergence's tests, and how a function is run on them."""

import pytest
import torch

from tests.budget import assert_within_budget
from tokenkit.kernels.head import logits
from tokenkit.kernels.linear_divergence import adaptive_weight, linear_divergence, passes, tile
from tokenkit.kernels.reference.linear_divergence import linear_divergence as reference
from tokenkit.structs import Head

NAMES = ("dstudent", "dweight", "dbias", "dteacher")
MODES = ("recompute", "weighted", "rows", "value")
SETS = ("identity", "map", "pairs", "rest")
HEADS = {"softcap": 3.0, "scale": 1.3}
OPTIONS = {"temperature": 1.7, "teacher_temperature": 0.8, "skew": 0.2, "alpha": 0.4}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks and tiles so small that small shapes cross every boundary."""
    for module in (tile, logits, adaptive_weight):
        monkeypatch.setattr(module, "BLOCK_V", 32)
    monkeypatch.setattr(logits, "GROUP_BYTES", 1000)
    monkeypatch.setattr(passes, "COLUMNS", (16, 16))


def index_set(name, V, W):
    """Return index options by name; pairs repeat ids on both sides, or with `unique` on neither."""
    if name == "identity":
        return {}
    if name == "map":
        return {"teacher_index": torch.randint(W, (V,))}
    if name == "unique":
        return {"student_index": torch.randperm(V)[: V // 2], "teacher_index": torch.randperm(W)[: V // 2]}
    pairs = {"student_index": torch.randint(max(V // 2, 1), (V,)), "teacher_index": torch.randint(W, (V,))}
    return pairs | {"rest_as_outcome": name == "rest"}


def make(N, V, W, device="cpu", *, padding=3, bias=True):
    """Return student, weight, bias, teacher, teacher's weight and bias, and unequal upstream gradients."""
    D, E = 8, 6
    return (
        torch.randn(N, D, device=device),
        torch.randn(V + padding, D, device=device) / D**0.5,
        torch.randn(V + padding, device=device) if bias else None,
        torch.randn(N, E, device=device),
        torch.randn(W + padding, E, device=device) / E**0.5,
        torch.randn(W + padding, device=device) if bias else None,
        torch.rand(N, device=device) + 0.1,
    )


def run(function, dtype, inputs, kind="kl", *, sizes, mode="recompute", head=HEADS, **options):
    """Return values and gradients by name of `function` on copies of the inputs in `dtype`."""
    *tensors, upstream = inputs
    student, weight, bias, teacher, teacher_weight, teacher_bias = (
        None if x is None else x.detach().to(dtype) for x in tensors
    )
    trained = [student, weight, bias, teacher] if mode not in ("rows", "value") else [student, teacher]
    trained = [] if mode == "value" else [x for x in trained if x is not None]
    for x in trained:
        x.requires_grad_()
    heads = (
        Head(weight, bias, vocab_size=sizes[0], **head),
        Head(teacher_weight, teacher_bias, vocab_size=sizes[1], **head),
    )
    if mode == "weighted":
        options = options | {"row_weight_N": upstream}
    value = function(student, heads[0], teacher, heads[1], kind, **options)
    total = value if mode == "weighted" else (value * upstream).sum()
    if trained:
        (2 * total).backward()
    gradients = zip(NAMES, (student, weight, bias, teacher), strict=True)
    found = {name: x.grad for name, x in gradients if x is not None and x.grad is not None}
    return found | {"value": value.detach()}


def assert_like_eager(dtype, inputs, kind, *, ours=None, **options):
    rounded = tuple(None if x is None else x.to(dtype) for x in inputs[:6]) + inputs[6:]
    kernel = run(linear_divergence, dtype, rounded, kind, **options, **(ours or {}))
    eager = run(reference, dtype, rounded, kind, **options)
    truth = run(reference, torch.float64, rounded, kind, **options)
    assert kernel.keys() == truth.keys()
    for name, value in truth.items():
        assert_within_budget(f"{kind} {name}", kernel[name], eager[name], value)
