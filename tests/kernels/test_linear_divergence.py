"""linear_divergence against its float64 definition, in every mode, through torch's and Triton's epilogues.

Faults tried, each caught by a test here, or in test_linear_divergence_ranks.py: a mask dropped, or off by
one, in the sums; the wrong maximum, or no rescaling when it rises; the softcap's slope dropped (pairs,
rest, Triton); padding rows counted; upstream gradients ignored (rows, recompute, weighted, rest); the
temperature dropped; shares of repeated ids dropped from the log-sum-exp or from dz; κ of the wrong sign; dW
of repeated rows written instead of added; a 16-bit dW added up over chunks; the teacher's kind not
mirrored; the rest's pull left out of Σ e; the map shifted inside its tile; pairs and rest cut one column
off; the bias of another tile; φ replaced by its definition; the head of akl at the wrong end of its ties.
Ranks: maximum, sums or dX not added up; the teacher's rest counted by every rank; ties of other ranks
forgotten.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.budget import relative_error
from tests.conftest import VECTORS
from tests.kernels.divergence_cases import (
    MODES,
    OPTIONS,
    SETS,
    assert_like_eager,
    index_set,
    make,
    run,
    small_tiles,  # noqa: F401
)
from tokenkit.kernels.head import logits
from tokenkit.kernels.linear_divergence import KINDS, linear_divergence, passes
from tokenkit.kernels.reference.linear_divergence import divergence
from tokenkit.kernels.reference.linear_divergence import linear_divergence as reference
from tokenkit.structs import Head


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("outcomes", [*SETS, "unique"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_definition(kind, outcomes, mode):
    """Values and every gradient in float64, head options, temperatures and padding rows included."""
    V, W = 41, 41 if outcomes == "identity" else 50
    inputs, options = make(5, V, W), index_set(outcomes, V, W) | OPTIONS
    for budget in (0, 1 << 30):
        extra = {"workspace_bytes": budget}
        kernel = run(
            linear_divergence, torch.float64, inputs, kind, sizes=(V, W), mode=mode, **options, **extra
        )
        truth = run(reference, torch.float64, inputs, kind, sizes=(V, W), mode=mode, **options)
        assert kernel.keys() == truth.keys()
        for name, value in truth.items():
            torch.testing.assert_close(kernel[name], value, rtol=1e-9, atol=1e-11, msg=f"{name} {budget}")


CASES = {
    "f32": (torch.float32, "identity", "recompute", 0),
    "bf16": (torch.bfloat16, "rest", "weighted", 1 << 13),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_errs_no_more_than_eager(kind, case, device):
    dtype, outcomes, mode, budget = CASES[case]
    V = 41
    inputs = make(32, V, V, device)
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in index_set(outcomes, V, V).items()}
    assert_like_eager(
        dtype, inputs, kind, sizes=(V, V), mode=mode, ours={"workspace_bytes": budget}, **options, **OPTIONS
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_and_torch_agree_with_float64(kind, case, executor, device):
    """Two rows, because a program of the interpreter takes milliseconds."""
    dtype, outcomes, mode, budget = CASES[case]
    V = 41
    inputs = [x.to(dtype) for x in make(2, V, V, device)[:6]] + [torch.tensor([0.5, 2.0], device=device)]
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in index_set(outcomes, V, V).items()}
    options |= OPTIONS | {"sizes": (V, V), "mode": mode}
    kernel = run(linear_divergence, dtype, inputs, kind, workspace_bytes=budget, **options)
    truth = run(reference, torch.float64, inputs, kind, **options)
    for name, value in truth.items():
        limit = 3e-6 if dtype == torch.float32 or name == "value" else 1e-2
        assert relative_error(kernel[name], value) < limit, name


@pytest.mark.parametrize("mode", ["rows", "weighted", "recompute"])
def test_plain_heads_of_any_size(mode, executor, device):
    """No bias, no softcap, several chunks; vocabularies smaller than a block, of whole blocks, and odd."""
    for N, V in ((1, 1), (2, 20), (2, 64), (3, 65)):
        inputs = make(N, V, V, device, padding=0, bias=False)
        options = {"sizes": (V, V), "mode": mode, "head": {}, "temperature": 2.0}
        kernel = run(linear_divergence, torch.float32, inputs, workspace_bytes=1000, **options)
        truth = run(reference, torch.float64, inputs, **options)
        assert all(relative_error(kernel[name], truth[name]) < 3e-6 for name in truth)


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_and_index_set(data):
    """float64, through torch: shapes, maps with duplicates, temperatures, budgets, kinds, modes."""
    V, W, N = (data.draw(st.integers(low, high)) for low, high in ((1, 40), (1, 40), (0, 6)))
    outcomes, kind = data.draw(st.sampled_from(SETS)), data.draw(st.sampled_from(KINDS))
    mode = data.draw(st.sampled_from(MODES))
    W = V if outcomes == "identity" else W
    inputs, options = make(N, V, W), index_set(outcomes, V, W)
    options["temperature"] = data.draw(st.floats(0.3, 5))
    options["teacher_temperature"] = data.draw(st.floats(0.3, 5))
    options["skew"] = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    if options.get("rest_as_outcome"):  # a rest of one model alone is infinite for some kinds
        unpaired = [
            size - len(options[name].unique()) for name, size in (("student_index", V), ("teacher_index", W))
        ]
        kind = kind if all(unpaired) or not any(unpaired) else "js"
    budget = {"workspace_bytes": data.draw(st.sampled_from([0, 3000, 1 << 30]))}
    kernel = run(linear_divergence, torch.float64, inputs, kind, sizes=(V, W), mode=mode, **options, **budget)
    truth = run(reference, torch.float64, inputs, kind, sizes=(V, W), mode=mode, **options)
    for name, value in truth.items():
        torch.testing.assert_close(
            kernel[name], value, rtol=1e-8, atol=1e-10, msg=f"{kind} {outcomes} {name}"
        )


@pytest.mark.parametrize("kind", ["kl", "rkl", "skl", "srkl", "js", "akl"])
def test_reference_values(kind):
    values = np.load(VECTORS)
    student, teacher = (torch.tensor(values[name]) for name in ("div_zs", "div_zt"))
    student.requires_grad_()
    head = Head(torch.eye(student.shape[1], dtype=torch.float64))
    options = {"temperature": 2.0, "teacher_temperature": 1.5, "skew": 0.1, "alpha": 0.5}
    for function in (linear_divergence, reference):
        value = function(student, head, teacher, head, kind, **options)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert relative_error(value.detach(), torch.tensor(values[f"div_{kind}"])) < 1e-5
        assert relative_error(gradient, torch.tensor(values[f"div_{kind}_g"])) < 1e-5


@pytest.mark.parametrize("mode", ["recompute", "rows", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, mode):
    """Finite differences. akl's weight is constant by definition, so its gradient is checked elsewhere."""
    if kind == "akl":
        kind = "kl"
    *tensors, upstream = make(2, 9, 9, padding=1)
    student, weight, bias, teacher, teacher_weight, _ = (x.double() for x in tensors)
    index = {"student_index": torch.tensor([0, 3, 3, 5]), "teacher_index": torch.tensor([1, 1, 2, 7])}
    trained = [student, teacher] if mode == "rows" else [student, teacher, weight, bias]
    for x in trained:
        x.requires_grad_()

    def value(*_):
        extra = {"row_weight_N": upstream.double()} if mode == "weighted" else {}
        heads = Head(weight, bias, softcap=3.0, vocab_size=9), Head(teacher_weight, vocab_size=9)
        return linear_divergence(
            student,
            heads[0],
            teacher,
            heads[1],
            kind,
            **index,
            rest_as_outcome=kind != "kl",
            skew=0.3,
            **extra,
        )

    assert torch.autograd.gradcheck(value, trained)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_80_are_exact(kind, executor, device):
    """Peaked rows: agreeing, disagreeing, and one model flat."""
    V = 40
    weight = torch.zeros(V, 4, device=device)
    weight[7, 0], weight[9, 1] = 80.0, 80.0
    weight[:, 2] = torch.linspace(-1, 1, V, device=device)
    student = torch.tensor([[1.0, 0, 1, 0], [1.0, 0, 1, 0], [0.0, 0, 1, 0]], device=device)
    teacher = torch.tensor([[1.0, 0, 0.5, 0], [0.0, 1, 1, 0], [1.0, 0, 0, 0]], device=device)
    inputs = (student, weight, None, teacher, weight, None, torch.ones(3, device=device))
    kernel, truth = (
        run(function, dtype, inputs, kind, sizes=(V, V), head={})
        for function, dtype in ((linear_divergence, torch.float32), (reference, torch.float64))
    )
    for name, value in truth.items():
        assert (kernel[name] - value).abs().max() <= 1e-5 * max(value.abs().max(), 1), name


@pytest.mark.parametrize("kind", ["kl", "rkl", "skl", "srkl", "js"])
def test_close_models_keep_their_small_divergence(kind, executor, device):
    """A log-sum-exp in float32 is 1e-6 off; a divergence of 1e-7 is right to 1 %, and never negative."""
    inputs = make(4, 41, 41, device, padding=0, bias=False)
    close = inputs[0][:, :6] + 5e-4 * torch.randn(4, 6, device=device)
    inputs = (inputs[0][:, :6], inputs[1][:, :6], None, close, inputs[1][:, :6].clone(), None, inputs[6])
    kernel, truth = (
        run(function, dtype, inputs, kind, sizes=(41, 41), head={})
        for function, dtype in ((linear_divergence, torch.float32), (reference, torch.float64))
    )
    assert truth["value"].max() < 1e-6
    assert kernel["value"].min() >= 0
    torch.testing.assert_close(kernel["value"].double(), truth["value"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_at_the_minimum(kind, executor, device):
    student, weight, bias, *_ = make(3, 41, 41, device, padding=0)
    found = run(
        linear_divergence,
        torch.float32,
        (student, weight, bias, student, weight, bias, torch.ones(3, device=device)),
        kind,
        sizes=(41, 41),
    )
    assert all(not value.any() for value in found.values())


def test_a_hand_worked_row():
    """Two coins: p = (1/2, 1/2), q = (3/4, 1/4)."""
    z_s, z_t = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()
    head = Head(torch.eye(2))
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    for kind, expected in (("kl", kl), ("abs", 0.5), ("log_abs", np.log(1.5) + np.log(2))):
        assert linear_divergence(z_s, head, z_t, head, kind).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode, kind):
    inputs = make(0, 20, 20)
    found = run(linear_divergence, torch.float32, inputs, kind, sizes=(20, 20), mode=mode)
    assert all(not value.any() for value in found.values())
    assert found["value"].shape == (() if mode == "weighted" else (0,))


@pytest.mark.parametrize("mode", ["recompute", "rows", "weighted"])
def test_a_second_backward_and_a_second_run_give_the_same(mode, executor, device):
    student, weight, _, teacher, teacher_weight, _, upstream = make(4, 41, 41, device)
    trained = [x.requires_grad_() for x in ([student] if mode == "rows" else [student, weight])]
    extra = {"row_weight_N": upstream} if mode == "weighted" else {}
    index = {"student_index": torch.tensor([1, 1, 2], device=device)}
    index["teacher_index"] = torch.tensor([0, 3, 3], device=device)
    runs = []
    for _ in range(2):
        value = linear_divergence(student, Head(weight), teacher, Head(teacher_weight), **index, **extra)
        total = value if mode == "weighted" else (value * upstream).sum()
        runs += [torch.autograd.grad(total, trained, retain_graph=i == 0) for i in range(2)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_of_equally_likely_outcomes_the_first_are_the_head(executor, device):
    """Four outcomes of 1/4 and a tail of less than 0.6: two of them, the last two."""
    student = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], device=device).log()
    teacher = torch.zeros(2, 4, device=device)
    head, q, p = Head(torch.eye(4, device=device)), torch.full((2, 4), 0.25), student.exp().cpu()
    gap = (q - p).abs()
    w = gap[:, :2].sum(1) / gap.sum(1)
    kl, rkl = (divergence(p.log(), q.log(), kind) for kind in ("kl", "rkl"))
    value = linear_divergence(student, head, teacher, head, "akl", alpha=0.6).cpu()
    torch.testing.assert_close(value, w * kl + (1 - w) * rkl)


def test_a_16_bit_head_is_summed_in_float32():
    """Hundreds of chunks of a row each: dW is as exact as one product, rounded once."""
    student, weight, _, teacher, teacher_weight, _, upstream = make(300, 41, 41, padding=0, bias=False)
    inputs = [x.bfloat16() for x in (student, weight, teacher, teacher_weight)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        s, w, t, u = (x.detach().to(dtype) for x in inputs)
        w.requires_grad_()
        function = linear_divergence if dtype == torch.bfloat16 else reference
        extra = {"workspace_bytes": 4 * weight.numel()} if dtype == torch.bfloat16 else {}
        function(s, Head(w), t, Head(u), row_weight_N=upstream.to(dtype), **extra).backward()
        found.append(w.grad.double())
    assert (found[0] - found[1]).abs().max() / found[1].abs().max() < 1.1 * 2**-9


def test_nothing_of_the_size_of_all_logits_is_allocated(monkeypatch):
    """Beside inputs and gradients, every allocation of a step of 512 rows stays within its budget."""
    sizes = []
    for owner, name in [(torch, "empty"), (torch.Tensor, "new_empty"), (torch.Tensor, "new_zeros")]:
        original = getattr(owner, name)

        def counted(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            sizes.append(tensor.nbytes)
            return tensor

        monkeypatch.setattr(owner, name, counted)
    monkeypatch.setattr(logits, "GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(passes, "COLUMNS", (128, 8192))
    N, V, budget = 256, 2000, 1 << 18
    inputs = make(N, V, V, bias=False)
    for mode in ("recompute", "weighted", "rows"):
        sizes.clear()
        found = run(
            linear_divergence, torch.float32, inputs, sizes=(V, V), mode=mode, workspace_bytes=budget,
        )  # fmt: skip
        assert found["dstudent"].any()
        assert max(sizes) <= max(budget, inputs[0].nbytes)
