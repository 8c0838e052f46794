"""sorted_distance against its definition by sorting, binned and exact, with torch's and Triton's epilogues.

Where `error_bound` is 0 the bins are exact, so values and gradients must be those of the sort; elsewhere the
value must lie between the sort's and the bound.

Faults tried, each caught by a test here or in the files beside: a row's last columns dropped from its
histogram; the maximum that of the last block; the sum of exp not rescaled when it rises; a bin's own count
added to those above it (Triton, torch); the first bin's ids counted twice; the fine octaves' slope wrong; the
sign of the bin above or below in the gradient (Triton, torch); Σ p·sign left out, or of the difference;
the foot left in the mass; the bound of the bins not a bound, and p at it in no bin; half a step left out
(Triton, torch); a borrow between place and count; a row's bins put in another's; the softcap's slope dropped
(Triton, torch, exact); α dropped from the gradient (formed, tables); padding rows counted; upstream gradient
ignored (formed, tables), or the row weight; the teacher's temperature forgotten; the longer teacher's tail
not summed; signs not put back in the order before the sort; the second chunk's rows written over the first's;
dW of the last chunk alone; dbias not written; NaN let through; the bound's teacher forgotten.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import VECTORS
from tests.kernels.sorted_cases import (
    EXACT,
    EXECUTED,
    MODES,
    THREE_ROWS,
    assert_like_eager,
    bound,
    certain,
    make,
    of_logits,
    run,
    two_models,
)
from tokenkit.kernels.head import logits
from tokenkit.kernels.head.side import side_of
from tokenkit.kernels.reference import sorted_distance as reference
from tokenkit.kernels.sorted_distance import error_bound, rows, sorted_distance
from tokenkit.kernels.sorted_distance import tile as sorted_tile
from tokenkit.structs import Head

SHAPES = [
    (1, 1, 1, 1),  # nothing to sort
    (5, 33, 49, 6),  # odd everywhere; the teacher's vocabulary is the larger
    (6, 48, 32, 8),  # exact multiples; the student's is the larger
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Programs of 16 columns, CPU pieces of three rows, histograms merged by twos."""
    monkeypatch.setattr(rows, "COLUMNS", (16, 16))
    monkeypatch.setattr(logits, "BLOCK_V", 16)
    monkeypatch.setattr(logits, "GROUP_BYTES", 500)
    for name, value in {"BLOCK_V": 16, "HISTOGRAM_BLOCK_V": 8, "PIECE": 100, "MERGE_ROWS": 2}.items():
        monkeypatch.setattr(sorted_tile, name, value)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1.0), (torch.float32, 12.0), (torch.bfloat16, 4.0)],
    ids=["f32-flat", "f32-peaked", "bf16"],
)
@pytest.mark.parametrize(("N", "V", "W", "D"), SHAPES)
@MODES
@EXECUTED
def test_matches_float64(exact, mode, N, V, W, D, dtype, scale, executor, device):
    inputs = make(N, V, W, D, device, scale=scale)
    assert_like_eager(dtype, inputs, mode, exact=exact, workspace_bytes=THREE_ROWS)


@pytest.mark.parametrize(
    "heads",
    [
        ({"softcap": 4.0, "scale": 1.7}, {"softcap": 3.0, "scale": 0.6}),
        ({"vocab_size": 30}, {"vocab_size": 41}),
    ],
    ids=["softcap", "padded"],
)
@MODES
@EXECUTED
def test_head_options_reach_values_and_gradients(exact, mode, heads, executor, device):
    inputs = make(5, 33, 49, 6, device)
    assert_like_eager(torch.float32, inputs, mode, exact=exact, heads=heads, temperature=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@MODES
@EXACT
def test_reference_values(exact, mode, dtype, device, monkeypatch):
    monkeypatch.undo()
    values = dict(np.load(VECTORS))
    rows = values["uld_per_row"].shape[1]
    student, teacher = (
        torch.tensor(values[f"{x}_hidden"])[:, :rows].flatten(0, 1) for x in ("student", "teacher")
    )
    weight, teacher_weight = (torch.tensor(values[f"{x}_weight"]) for x in ("student", "teacher"))
    upstream = torch.ones(len(student)) / 3
    inputs = [student, weight, None, teacher, teacher_weight, None, upstream]
    inputs = [None if x is None else x.to(device) for x in inputs]
    result = run(sorted_distance, dtype, inputs, mode, exact=exact)
    truth = torch.tensor(values["uld_per_row"]).flatten().to(device)
    gradient = torch.tensor(values["uld_dh"])[:, :rows].flatten(0, 1).to(device)
    known = certain(inputs)
    if mode == "formed":
        slack = 0 if exact else bound(inputs).sum().item() / 3
        torch.testing.assert_close(result["value"].double(), truth.sum() / 3, rtol=1e-6, atol=1e-6 + slack)
    else:
        error = truth - result["value"]
        assert (error.abs() <= 1e-5).all()
        assert (error[known].abs() <= 1e-6).all()
    rows_to_check = torch.ones_like(known) if exact else known
    assert rows_to_check.sum() > 20
    error = (result["dhidden"].double() - gradient)[rows_to_check].abs().max()
    assert error <= 1e-5 * gradient.abs().max()


@given(two_models())
def test_the_value_is_between_the_sorts_and_the_bound(logits):
    truth = of_logits(reference.sorted_distance, *logits)
    room = of_logits(error_bound, *logits)
    for dtype, rounding in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        value = of_logits(sorted_distance, *logits, dtype, exact=False).double()
        assert (truth - value >= -rounding).all()
        assert (truth - value <= room + rounding).all()


@given(two_models())
def test_exact_is_the_sort(logits):
    truth = of_logits(reference.sorted_distance, *logits)
    torch.testing.assert_close(of_logits(sorted_distance, *logits, exact=True), truth, rtol=1e-12, atol=1e-14)


@given(two_models(), st.integers(0, 2**16))
def test_ids_have_no_names(logits, seed):
    student, teacher = logits
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
    one, other = (
        of_logits(sorted_distance, x, teacher, torch.float32, exact=False) for x in (student, student[order])
    )
    torch.testing.assert_close(one, other, rtol=0, atol=3e-6)  # the log-sum-exp adds in another order


@EXECUTED
def test_equal_distributions_are_at_distance_zero_and_pull_nothing(exact, executor, device):
    hidden = torch.randn(5, 6, device=device, requires_grad=True)
    weight = torch.randn(40, 6, device=device)
    for other in (weight, weight.flip(0)):
        value = sorted_distance(hidden, Head(weight), hidden.detach(), Head(other), exact=exact)
        value.sum().backward()
        if other is weight:
            assert not value.any()
            assert not hidden.grad.any()
        assert (value < 3e-6).all()


@EXECUTED
def test_a_certain_student_is_two_less_two_over_w_from_a_uniform_teacher(exact, executor, device):
    """|1 − 1/W| + (W − 1)/W, by hand; every probability of the student below e^-80 but one."""
    student = torch.zeros(30, 1, device=device)
    student[11] = 90.0
    one = torch.ones(1, 1, device=device)
    for W in (10, 30, 70):
        teacher = torch.zeros(W, 1, device=device)
        value = sorted_distance(one, Head(student), one, Head(teacher), exact=exact)
        # binned, all W are inside one bin, a 256th of 1 / W wide at most, and the counts cross there
        tolerance = 1e-6 if exact else 2 / 256 / W
        torch.testing.assert_close(value, torch.full_like(value, 2 - 2 / W), rtol=0, atol=tolerance)


@EXECUTED
def test_two_ids_by_hand(exact, executor, device):
    """p = (0.8, 0.2), q = (0.5, 0.3, 0.2): 0.3 + 0.1 + 0.2, and dz = p (G − Σ p G) with G = (1, −1)."""
    p, q = (torch.tensor(x, device=device).log()[:, None] for x in ([0.2, 0.8], [0.3, 0.5, 0.2]))
    one = torch.ones(1, 1, device=device)
    p.requires_grad_()
    value = sorted_distance(one, Head(p), one, Head(q), exact=exact)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([0.6], device=device))
    expected = torch.tensor([0.2 * (-1 - 0.6), 0.8 * (1 - 0.6)], device=device)
    torch.testing.assert_close(p.grad[:, 0], expected)


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_every_id_is_in_one_bin_and_the_bins_hold_all_the_mass(scale, executor, device):
    """Also where nearly all ids share the first bin."""
    z_NV = scale * torch.randn(3, 90, device=device)
    side = side_of("z_NV", z_NV, Head(torch.eye(90, device=device)))
    softmax = rows.softmax_of(side, z_NV, 1.0, slice(0, 3))
    foot_N = sorted_tile.foot(softmax.inverse_N)
    bins = sorted_tile.histogram(z_NV, softmax, foot_N)
    assert ((bins[0] >> sorted_tile.COUNT).sum(1) == 90).all()
    _, sign_NB, mean_N = sorted_tile.merge(bins, bins, foot_N, torch.float32)
    assert (sign_NB >= 0).all()
    torch.testing.assert_close(mean_N, torch.ones_like(mean_N), rtol=0, atol=1e-6)


@EXECUTED
def test_the_largest_probability_may_be_a_power_of_two(exact, executor, device):
    """p = (1/2, 1/4, 1/8, 1/8): the first is the bound of the row's bins itself."""
    q = torch.tensor([0.45, 0.22, 0.17, 0.16], device=device).log()[:, None]
    one = torch.ones(1, 1, device=device)
    p = -0.6931471805599453 * torch.tensor([[0.0], [1], [2], [2]], device=device)
    p.requires_grad_()
    sorted_distance(one, Head(p), one, Head(q), exact=exact).sum().backward()
    expected = torch.tensor([0.5 * 0.5, 0.25 * 0.5, 0.125 * -1.5, 0.125 * -1.5], device=device)
    torch.testing.assert_close(p.grad[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_a_probability_on_an_edge_has_its_sign(dtype, executor, device):
    """One id each, p on an edge and q far below: the place inside the bin is 0, the sign is not."""
    foot_N = torch.tensor([2.0**-25], device=device)
    bins = []
    for p in (0.25 - 2.0**-25, 0.1):
        softmax = sorted_tile.Softmax(*torch.tensor([[0.0], [p]], device=device, dtype=dtype))
        bins.append(sorted_tile.histogram(torch.zeros(1, 1, device=device, dtype=dtype), softmax, foot_N))
    value_N, _, mean_N = sorted_tile.merge(bins[0], bins[0] - bins[1], foot_N, dtype)
    torch.testing.assert_close(mean_N, torch.full_like(mean_N, 0.25 - 2.0**-25), rtol=1e-6, atol=0)
    torch.testing.assert_close(value_N, torch.full_like(value_N, 0.15), rtol=1e-6, atol=0)


@pytest.mark.parametrize("edge", [0.25, 0.125, 2.0**-9])
def test_a_probability_that_float32_would_round_up_to_an_edge_stays_below_it(edge, device):
    """float64: in the bin above the edge it would count twice what it lacks, and the value be no bound."""
    foot_N = torch.tensor([2.0**-25], device=device)
    largest_N = torch.tensor([0.0, edge - 2.0**-25 - edge * 1e-8], device=device, dtype=torch.float64)
    assert (largest_N[1] + foot_N.double()).float() == edge
    none_NV = torch.zeros(1, 1, device=device, dtype=torch.float64)
    softmax = sorted_tile.Softmax(*largest_N[:, None])
    bins = sorted_tile.histogram(none_NV, softmax, foot_N)
    value_N, _, mean_N = sorted_tile.merge(bins, bins, foot_N, torch.float64)
    torch.testing.assert_close(value_N, largest_N[1:], rtol=1e-12, atol=0)
    torch.testing.assert_close(mean_N, largest_N[1:], rtol=1e-12, atol=0)


def test_real_vocabularies_are_within_3e_5(monkeypatch, device):
    """Normal logits of 151936 against 128256 ids; the flattest and the most peaked rows of the four."""
    monkeypatch.undo()
    scale = torch.tensor([1.0, 2.0, 3.0, 5.0], device=device)[:, None]
    student, teacher = (torch.randn(4, 64, device=device) * scale for _ in range(2))
    weights = [torch.randn(size, 64, device=device) / 8 for size in (151_936, 128_256)]
    heads = [Head(weight.double()) for weight in weights]
    truth = reference.sorted_distance(student.double(), heads[0], teacher.double(), heads[1])
    value = sorted_distance(student, Head(weights[0]), teacher, Head(weights[1]), exact=False)
    assert (truth - value).abs().max() <= 3e-5
    room = error_bound(student, Head(weights[0]), teacher, Head(weights[1]))
    assert (truth - value <= room + 2e-6).all()
    assert room.max() <= 5e-3


@MODES
@EXACT
def test_gradcheck(exact, mode, device):
    """The binned value is piecewise linear in p, and the gradient is its own."""
    inputs = make(2, 13, 17, 3, device)
    hidden, weight, bias, teacher, teacher_weight, teacher_bias, upstream = (x.double() for x in inputs)
    hidden.requires_grad_()
    for x in (weight, bias):
        x.requires_grad_(mode != "frozen")
    row_weight = upstream if mode == "formed" else None

    def value(hidden, weight, bias):
        return sorted_distance(
            hidden, Head(weight, bias, softcap=3.0, scale=0.7), teacher, Head(teacher_weight, teacher_bias),
            temperature=0.8, exact=exact, row_weight_N=row_weight,
        )  # fmt: skip

    assert torch.autograd.gradcheck(value, (hidden, weight, bias), eps=1e-7, atol=1e-6)


def test_16_bit_inputs_lose_only_their_own_rounding(executor, device):
    inputs = make(6, 48, 32, 24, device, scale=3.0, bias=False)
    inputs = [None if x is None else x.bfloat16() for x in inputs[:-1]] + [inputs[-1]]
    inputs[-1] = inputs[-1] * certain(inputs)
    truth = run(reference.sorted_distance, torch.float64, inputs, "tables")
    for mode in ("tables", "formed", "frozen"):
        kernel = run(sorted_distance, torch.bfloat16, inputs, mode, exact=False)
        assert kernel["value"].dtype == torch.float32
        for name in ("dhidden", "dweight"):
            if name in kernel:
                error = (kernel[name].double() - truth[name]).abs().max() / truth[name].abs().max()
                assert error <= 6e-3, (mode, name, error)


@MODES
@EXECUTED
def test_repeats_bit_for_bit_and_over_chunks(exact, mode, executor, device):
    """Chunks are whole rows: their number moves nothing but the order in which dW is added up."""
    inputs = make(5, 33, 49, 6, device)
    first, second = (run(sorted_distance, torch.float32, inputs, mode, exact=exact) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    cut = run(sorted_distance, torch.float32, inputs, mode, exact=exact, workspace_bytes=0)
    for name, value in first.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-5, msg=name)


@MODES
@EXACT
def test_a_second_backward_gives_the_same_and_a_second_derivative_is_refused(exact, mode, device):
    hidden, weight, _, teacher, teacher_weight, _, upstream = make(5, 33, 49, 6, device)
    hidden.requires_grad_()
    weight.requires_grad_(mode != "frozen")
    inputs = [hidden] if mode == "frozen" else [hidden, weight]
    row_weight = upstream if mode == "formed" else None
    total = sorted_distance(
        hidden, Head(weight), teacher, Head(teacher_weight), exact=exact, row_weight_N=row_weight
    ).sum()
    first, second = (torch.autograd.grad(total, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, inputs, create_graph=True)


@MODES
@EXECUTED
def test_no_rows_and_rows_of_no_weight(exact, mode, executor, device):
    for N, weight in ((0, 1.0), (4, 0.0)):
        inputs = make(N, 33, 49, 6, device)
        inputs = (*inputs[:-1], torch.full((N,), weight, device=device))
        result = run(sorted_distance, torch.float32, inputs, mode, exact=exact)
        assert result["value"].shape == (() if mode == "formed" else (N,))
        assert not any(x.any() for name, x in result.items() if name != "value")
