"""Inputs, runs and marks that the tests of sorted_distance share."""

import pytest
import torch
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tokenkit.kernels.reference import sorted_distance as reference
from tokenkit.kernels.sorted_distance import error_bound, rows, sorted_distance
from tokenkit.structs import Head

THREE_ROWS = 3 * (rows.HISTOGRAM_BYTES + 1000)  # a workspace that cuts 5 rows in two chunks
NAMES = ("value", "dhidden", "dweight", "dbias")

MODES = pytest.mark.parametrize("mode", ["tables", "formed", "frozen"])
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["binned", "exact"])
EXECUTED = pytest.mark.parametrize(
    ("exact", "executor"),
    [(False, "torch"), (False, "triton"), (True, "triton")],  # a sort is torch's with either
    ids=["binned-torch", "binned-triton", "exact"],
    indirect=["executor"],
)


def make(N, V, W, D, device, *, scale=1.0, bias=True):
    """Return student hidden, weight, bias, teacher hidden, weight, bias, and unequal upstream gradients.

    All are multiples of 1/64, so products of float32 are exact: what is measured is what comes after them.
    """

    def states(*shape, size=1.0):
        return (64 * size * torch.randn(*shape, device=device)).round() / 64

    E = D + 1
    student = states(N, D), states(V, D, size=scale / D**0.5), states(V) if bias else None
    teacher = states(N, E), states(W, E, size=scale / E**0.5), states(W) if bias else None
    return *student, *teacher, torch.rand(N, device=device) + 0.5


def run(function, dtype, inputs, mode="tables", heads=({}, {}), **options):
    """Return the results by NAMES of `function` on copies of the inputs in `dtype`."""
    *tensors, upstream_N = inputs
    hidden, weight, bias, teacher, teacher_weight, teacher_bias = (
        None if x is None else x.detach().to(dtype) for x in tensors
    )
    hidden.requires_grad_()
    for x in (weight, bias):
        if x is not None:
            x.requires_grad_(mode != "frozen")
    head, teacher_head = Head(weight, bias, **heads[0]), Head(teacher_weight, teacher_bias, **heads[1])
    if mode == "formed":
        row_weight_N = upstream_N.to(torch.promote_types(dtype, torch.float32))
        value = function(hidden, head, teacher, teacher_head, row_weight_N=row_weight_N, **options)
        (3 * value).backward()
    else:
        value = function(hidden, head, teacher, teacher_head, **options)
        value.backward(3 * upstream_N.to(value.dtype))
    results = (value.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad)
    return {name: x for name, x in zip(NAMES, results, strict=True) if x is not None}


def bound(inputs, heads=({}, {}), **options):
    """Return the error bound of each row in float64."""
    hidden, weight, bias, teacher, teacher_weight, teacher_bias = (
        None if x is None else x.detach().double() for x in inputs[:-1]
    )
    head, teacher_head = Head(weight, bias, **heads[0]), Head(teacher_weight, teacher_bias, **heads[1])
    return error_bound(hidden, head, teacher, teacher_head, **options)


def certain(inputs, heads=({}, {}), **options):
    """Say in which rows the bins hide nothing in float64: their values and gradients must be the sort's."""
    inputs = [*inputs[:-1], torch.ones_like(inputs[-1])]
    binned = run(sorted_distance, torch.float64, inputs, "frozen", heads, exact=False, **options)
    truth = run(reference.sorted_distance, torch.float64, inputs, "frozen", heads, **options)
    error_N = (binned["dhidden"] - truth["dhidden"]).abs().amax(1)
    return (bound(inputs, heads, **options) < 1e-7) & (error_N <= 1e-8)


def assert_like_eager(dtype, inputs, mode, *, exact=False, heads=({}, {}), **options):
    workspace = {"workspace_bytes": options.pop("workspace_bytes")} if "workspace_bytes" in options else {}
    rounded = [None if x is None else x.to(dtype) for x in inputs[:-1]]
    upstream_N = inputs[-1]
    if not exact:  # rows that the bins cannot tell apart count for nothing
        upstream_N = upstream_N * certain([*rounded, upstream_N], heads, **options)
        assert upstream_N.any()
    rounded.append(upstream_N)
    kernel = run(sorted_distance, dtype, rounded, mode, heads, exact=exact, **options, **workspace)
    eager = run(reference.sorted_distance, dtype, rounded, mode, heads, **options)
    truth = run(reference.sorted_distance, torch.float64, rounded, mode, heads, **options)
    assert kernel.keys() == truth.keys()
    for name, value in truth.items():
        if name == "value" and not exact and mode != "formed":
            kept = upstream_N > 0
            assert_within_budget(name, kernel[name][kept], eager[name][kept], value[kept])
        else:
            assert_within_budget(name, kernel[name], eager[name], value)


@st.composite
def two_models(draw):
    """Logits of two vocabularies: flat or peaked, apart or nearly equal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    V, W = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    scale = draw(st.sampled_from([0.1, 1.0, 4.0, 30.0]))
    student = scale * torch.randn(V, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(W, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        n = min(V, W)
        teacher[:n] = student[:n] + draw(st.sampled_from([0.0, 1e-3, 0.1])) * teacher[:n]
    return student.float().double(), teacher.float().double()  # so that float32 starts from the same


def of_logits(function, student, teacher, dtype=torch.float64, **options):
    """Call with heads that are the logits themselves."""
    one = torch.ones(1, 1, dtype=dtype)
    return function(one, Head(student[:, None].to(dtype)), one, Head(teacher[:, None].to(dtype)), **options)
