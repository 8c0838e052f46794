"""The eight differences against their float64 definitions and autograd, through torch's and Triton's lines.

Faults tried, each caught here: the temperature left in the two kinds that have none; 1/τ missing in a
slope; EPSILON missing; the sign of renyi's slope; p and q exchanged in binary_ce; a derivative of joschu_k3
without its minus.
"""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.kernels.alm_difference import DIFFERENCES, EPS, alm_difference
from tokenkit.kernels.reference.alm_difference import alm_difference as reference

LIKELIHOODS = [0.0, -1e-5, -1e-3, -0.1, -0.7, -3.0, -20.0, -90.0, -700.0]
EVERY_KIND = pytest.mark.parametrize("kind", DIFFERENCES)


def pairs(device):
    return (
        x.flatten() for x in torch.meshgrid(*[torch.tensor(LIKELIHOODS, device=device)] * 2, indexing="ij")
    )


def value_and_slope(function, teacher, student, kind, **options):
    student = student.detach().requires_grad_()
    value = function(teacher, student, kind, **options)
    weight = torch.linspace(1, 2, len(value), device=value.device, dtype=value.dtype)
    (slope,) = torch.autograd.grad((value * weight).sum(), student)
    return value.detach(), slope


@EVERY_KIND
@pytest.mark.parametrize(("temperature", "alpha"), [(100.0, 0.5), (1.0, 0.3), (7.0, 2.0)])
def test_matches_the_float64_definition_and_autograd(kind, temperature, alpha, executor, device):
    teacher, student = pairs(device)
    options = {"temperature": temperature, "renyi_alpha": alpha}
    truth = value_and_slope(reference, teacher.double(), student.double(), kind, **options)
    kernel = value_and_slope(alm_difference, teacher, student, kind, **options)
    keep = torch.isfinite(truth[0]) & torch.isfinite(truth[1])
    if kind != "joschu_k3":  # e^((t − s) / τ) overflows float64 at τ = 1 and s = −700 from float32's view
        assert keep.all()
    for name, value, expected in zip(("value", "slope"), kernel, truth, strict=True):
        value, expected = value[keep].double(), expected[keep].float().double()
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-9, msg=name, equal_nan=True)


@EVERY_KIND
def test_gradcheck(kind):
    teacher = -torch.rand(9, dtype=torch.double) * 5 - 0.1
    student = (-torch.rand(9, dtype=torch.double) * 5 - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: alm_difference(teacher, s, kind, temperature=3.0), student)


@EVERY_KIND
def test_equal_models_pull_nothing(kind, executor, device):
    logp = torch.tensor(LIKELIHOODS, device=device)
    _, slope = value_and_slope(alm_difference, logp, logp, kind)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)


@EVERY_KIND
def test_nothing_flows_into_the_teacher(kind):
    teacher, student = (torch.tensor([-1.0], requires_grad=True) for _ in range(2))
    alm_difference(teacher, student, kind).sum().backward()
    assert teacher.grad is None


def test_a_fair_coin_costs_log_two():
    half = torch.tensor([0.5]).log()
    value = alm_difference(half, half, "binary_ce", temperature=1.0)
    torch.testing.assert_close(value, torch.tensor([math.log(2)]), atol=2e-6, rtol=0)


def test_by_hand_at_one_nat():
    t, s = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert alm_difference(t, s, "abs").item() == 2.0
    torch.testing.assert_close(
        alm_difference(t, s, "joschu_k2", temperature=2.0).item(), 0.5, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        alm_difference(t, s, "joschu_k3", temperature=2.0).item(), math.e - 2, rtol=1e-6, atol=0
    )


def test_no_chunks_no_values(executor, device):
    empty = torch.zeros(0, device=device, requires_grad=True)
    alm_difference(empty.detach(), empty).sum().backward()
    assert empty.grad.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "binary"}, "expected one of abs, binary_ce"),
        ({"temperature": 0.0}, "positive"),
        ({"renyi_alpha": 1.0}, "not 1"),
        ({"renyi_alpha": math.nan}, "renyi_alpha must be positive, finite and not 1: got nan"),
        ({"renyi_alpha": math.inf}, "got inf"),
        ({"student": torch.zeros(3)}, "one shape and dtype"),
        ({"student": torch.zeros(2, device="meta")}, "one device: got cpu and meta"),
        ({"teacher": torch.zeros(2).half(), "student": torch.zeros(2).half()}, "float64: got torch.float16"),
    ],
)
def test_bad_input_is_named(options, message):
    teacher, student = (options.pop(name, torch.zeros(2)) for name in ("teacher", "student"))
    with pytest.raises(ValueError, match=message):
        alm_difference(teacher, student, **options)


@pytest.mark.parametrize("alpha", [0.3, 0.999, 1.001, 2.0, 3.0, 10.0])
@settings(deadline=None, max_examples=25)
@given(st.floats(-5e3, 0), st.floats(-5e3, 0))
def test_renyi_is_its_definition_however_far_apart(alpha, t, s):
    """Against 60 digits: A alone passes e^709 at s = -712 with alpha = 2."""
    with mpmath.workdps(60):
        u, v = mpmath.mpf(t) - mpmath.mpf(EPS), mpmath.mpf(s) - mpmath.mpf(EPS)
        p, q, a = mpmath.exp(u), mpmath.exp(v), mpmath.mpf(alpha)
        first, second = p**a * q ** (1 - a), (1 - p) ** a * (1 - q) ** (1 - a)
        value = float(mpmath.log(first + second) / (a - 1))
        slope = float((second * q / (1 - q) - first) / (first + second))
    student = torch.tensor([s], dtype=torch.float64, requires_grad=True)
    got = alm_difference(torch.tensor([t], dtype=torch.float64), student, "renyi", renyi_alpha=alpha)
    got.sum().backward()
    # log(A + B) is the difference of numbers near 1, known to 1e-16 / |alpha - 1|, and 1 - q to 1e-10 of eps
    assert got.item() == pytest.approx(value, rel=1e-8, abs=1e-12 + 1e-14 / abs(alpha - 1))
    assert student.grad.item() == pytest.approx(slope, rel=1e-8, abs=1e-9)


def test_renyi_far_apart_in_triton(executor, device):
    t, s = torch.tensor([-1.0, -700.0, -0.5]), torch.tensor([-900.0, -0.1, -3000.0])
    for alpha in (0.5, 2.0, 10.0):
        for dtype in (torch.float32, torch.float64):
            student = s.to(device, dtype, copy=True).requires_grad_()
            got = alm_difference(t.to(device, dtype), student, "renyi", renyi_alpha=alpha)
            got.sum().backward()
            exact = s.double().clone().requires_grad_()
            expected = reference(t.double(), exact, "renyi", renyi_alpha=alpha)
            expected.sum().backward()
            torch.testing.assert_close(got.detach().double().cpu(), expected.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(student.grad.double().cpu(), exact.grad, rtol=1e-6, atol=1e-6)
