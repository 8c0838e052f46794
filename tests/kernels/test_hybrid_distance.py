"""hybrid_distance against its definition, float64 and float32, and what it refuses.

Faults tried, each caught here: a factor c or d left out of the pairs or of the ranks; the gradient by log c
of one part alone; ε before the factor; the pull of clamped probabilities kept; β and 1 − β exchanged; scale,
softcap's slope or temperature missing in dz; a chunk's rows shifted; weights of rows or upstream left out.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.budget import assert_within_budget
from tokenkit.kernels import hybrid_distance as module
from tokenkit.kernels.head.side import side_of
from tokenkit.kernels.hybrid_distance import Measure, hybrid_distance, split_columns
from tokenkit.kernels.reference.hybrid_distance import hybrid_distance as reference
from tokenkit.structs import Head, Shard

N, V, W, D, E = 7, 23, 31, 5, 4
STUDENT_IDS, TEACHER_IDS = [2, 0, 17, 20], [4, 1, 30, 9]


def make(dtype=torch.float64, padding=2, scale=1.0):
    torch.manual_seed(0)
    sizes = [(N, D), (V + padding, D), (V + padding,), (N,), (N, E), (W + padding, E), (W + padding,), (N,)]
    tensors = [scale * torch.randn(size, dtype=torch.float64) for size in sizes]
    for i in (3, 7):
        tensors[i] = -tensors[i].abs()
        tensors[i][0] = 0
    return [x.to(dtype) for x in tensors]


def run(function, tensors, ids, measure, *, softcap=4.0):
    """Return the total and all gradients, with unequal weights of rows and an upstream gradient of 3."""
    leaves = [x.clone().requires_grad_() for x in tensors[:4]]
    x, weight, bias, log_scale = leaves
    head = Head(weight, bias, softcap, 0.7, V)
    teacher_head = Head(*tensors[5:7], softcap, 0.7, W)
    pairs = (
        None
        if ids is None
        else split_columns(head, teacher_head, *(torch.tensor(x, dtype=torch.int64) for x in ids))
    )
    weight_N = torch.linspace(0.5, 2, N).to(x.dtype)
    teacher = (tensors[4], teacher_head, tensors[7])
    total = function((x, head, log_scale), teacher, weight_N, pairs, measure)
    (3 * total).backward()
    return [total.detach(), *(leaf.grad for leaf in leaves)]


CASES = [
    (None, {}),
    (None, {"temperature": 2.0, "teacher_temperature": 0.5}),
    *[((STUDENT_IDS, TEACHER_IDS), {"matched_weight": 0.3, "beta": beta}) for beta in (0, 0.2, 0.5, 1)],
    ((STUDENT_IDS, TEACHER_IDS), {"matched_weight": 2.0, "unmatched_weight": 0.0}),
    (([], []), {}),
    ((list(range(V)), list(range(V))), {"matched_weight": 1.0}),
]


@pytest.mark.parametrize("workspace_bytes", [1, 9000, 2**28], ids=["one row", "some rows", "all rows"])
@pytest.mark.parametrize(("ids", "changes"), CASES)
def test_matches_the_definition(ids, changes, workspace_bytes):
    measure = Measure(workspace_bytes=workspace_bytes, **changes)
    truth, got = (run(function, make(), ids, measure) for function in (reference, hybrid_distance))
    for value, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert truth[0] != 0


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_as_exact_as_eager(beta):
    ids, measure, tensors = (STUDENT_IDS, TEACHER_IDS), Measure(0.3, 0.7, beta), make(torch.float32)
    truth = run(reference, [x.double() for x in tensors], ids, measure)
    eager = run(reference, tensors, ids, measure)
    names = ("total", "dstudent", "dweight", "dbias", "dlog_scale")
    for name, *values in zip(names, run(hybrid_distance, tensors, ids, measure), eager, truth, strict=True):
        assert_within_budget(name, *values)


def test_bfloat16_heads_and_states_have_sums_of_float32():
    ids, measure = (STUDENT_IDS, TEACHER_IDS), Measure(0.3, 0.7)
    rounded = [x.bfloat16() for x in make()]
    truth = run(hybrid_distance, [x.double() for x in rounded], ids, measure)
    got = run(
        hybrid_distance, [*rounded[:3], rounded[3].float(), *rounded[4:7], rounded[7].float()], ids, measure
    )
    assert got[0].dtype == torch.float32
    for value, expected, tolerance in zip(got, truth, (1e-5, 1e-2, 1e-2, 1e-2, 1e-5), strict=True):
        assert (value - expected).abs().max() < tolerance * expected.abs().max()


def test_histograms_are_near_the_sort():
    """In rows that a few ids rule, as those of language models; docs/kernels.md has the bound."""
    ids, tensors = (STUDENT_IDS, TEACHER_IDS), make(scale=2.0)
    exact, fast = (run(hybrid_distance, tensors, ids, Measure(0.3, 0.7, exact=x)) for x in (True, False))
    assert abs(exact[0] - fast[0]) < 1e-3 * exact[0]
    cosine = torch.nn.functional.cosine_similarity(exact[1].flatten(), fast[1].flatten(), 0)
    assert cosine > 0.99


@pytest.mark.parametrize("exact", [True, False])
def test_factors_that_vanish_leave_finite_gradients(exact):
    tensors = [x.float() for x in make()]
    tensors[3][1], tensors[7][1] = -200.0, -200.0
    tensors[3][2], tensors[7][3] = -90.0, -90.0
    got = run(hybrid_distance, tensors, (STUDENT_IDS, TEACHER_IDS), Measure(0.5, 0.5, exact=exact))
    assert all(x.isfinite().all() for x in got)
    assert not got[1][1].any()


def test_only_what_is_trained_gets_a_gradient():
    x, weight, bias, log_scale, *other = make()
    head, teacher_head = Head(weight, bias, vocab_size=V), Head(*other[1:3], vocab_size=W)
    teacher = (other[0], teacher_head, other[3])
    wanted = [x.requires_grad_(), log_scale.requires_grad_()]
    total = hybrid_distance((x, head, log_scale), teacher, torch.ones(N, dtype=torch.float64))
    assert all(g.any() for g in torch.autograd.grad(total, wanted))
    with torch.no_grad():
        assert not hybrid_distance((x, head, log_scale), teacher, torch.ones(N)).requires_grad
    total = hybrid_distance((x, head, log_scale), teacher, torch.ones(N, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, x, create_graph=True)


def test_compiles_whole():
    # two to five seconds: the compiler itself is imported
    x, weight, bias, log_scale, *other = (tensor.float() for tensor in make())
    pairs = split_columns(
        Head(weight, vocab_size=V), Head(other[1], vocab_size=W), torch.tensor([1, 5]), torch.tensor([2, 3])
    )

    def total(x, weight, log_scale):
        teacher = (other[0], Head(other[1], other[2], vocab_size=W), other[3])
        student = (x, Head(weight, bias, vocab_size=V), log_scale)
        return hybrid_distance(student, teacher, torch.ones(N), pairs, Measure(0.5, 0.5))

    leaves = [tensor.requires_grad_() for tensor in (x, weight, log_scale)]
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for one, other_one in zip(
        torch.autograd.grad(total(*leaves), leaves),
        torch.autograd.grad(compiled(*leaves), leaves),
        strict=True,
    ):
        assert torch.equal(one, other_one)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, bytes."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else (result,)
        self.nbytes = max([self.nbytes, *(x.nbytes for x in found if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("vocab", [8_000, 16_000])
def test_no_tensor_grows_with_rows_times_vocabulary(exact, vocab):
    rows, budget = 40, 2**20
    measure = Measure(0.5, 0.5, exact=exact, workspace_bytes=budget)
    sides = [side_of(name, torch.randn(rows, 4), Head(torch.randn(vocab, 4))) for name in ("one", "other")]
    index = torch.arange(vocab // 2)
    pairs = split_columns(sides[0].head, sides[1].head, index, index)
    zero_N = torch.zeros(rows)
    with Largest() as largest:
        module._run(sides, module._Rows(zero_N, zero_N, zero_N + 1), pairs, "xw", measure)
    assert largest.nbytes <= budget < 4 * rows * vocab


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.5}, r"beta must be in \[0, 1\]: got 1.5"),
        ({"temperature": 0}, "temperature must be positive and finite: got 0"),
        ({"teacher_temperature": float("inf")}, "teacher_temperature must be positive and finite"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run(hybrid_distance, make(), None, Measure(**changes))


def test_inputs_that_do_not_fit_are_named():
    tensors = make()
    head, teacher_head = Head(*tensors[1:3], vocab_size=V), Head(*tensors[5:7], vocab_size=W)
    student, teacher = (tensors[0], head, tensors[3]), (tensors[4], teacher_head, tensors[7])
    weight_N = torch.ones(N)
    with pytest.raises(ValueError, match="student's log scale must hold one number per row"):
        hybrid_distance((*student[:2], torch.zeros(3)), teacher, weight_N)
    with pytest.raises(ValueError, match="teacher_NE must have the rows"):
        hybrid_distance(student, (tensors[4][:3], *teacher[1:]), weight_N)
    with pytest.raises(ValueError, match="the student's head is divided over processes"):
        hybrid_distance(
            (tensors[0], dataclasses.replace(head, shard=Shard(None, 0)), tensors[3]), teacher, weight_N
        )
    nan = tensors[0].clone()
    nan[4, 1] = torch.nan
    with pytest.raises(ValueError, match="student_ND and its head must be finite: in row 4 it holds"):
        hybrid_distance((nan, *student[1:]), teacher, weight_N)
    for ids, words in (([1, 1], "names an id twice"), ([1, V], r"must hold ids in \[0, 23\)")):
        with pytest.raises(ValueError, match=words):
            split_columns(head, teacher_head, torch.tensor(ids), torch.tensor([1, 2]))
