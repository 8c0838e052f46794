"""projected_divergence against its definition, float64 and float32, and what it refuses.

Faults tried, each caught here: the softcap's slope forgotten; scale or temperature missing in dz; padding
rows counted; the projection transposed; the unreached ids left in q; no renormalisation of r; the row weight
applied twice; a chunk's rows shifted by one; the upstream gradient ignored.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tokenkit.kernels import launch
from tokenkit.kernels import projected_divergence as module
from tokenkit.kernels.head import products
from tokenkit.kernels.projected_divergence import make_projection, projected_divergence
from tokenkit.kernels.reference.projected_divergence import projected_divergence as reference
from tokenkit.structs import Head, Shard


def make_entries(V, W, M):
    """Return distinct entries of a sparse matrix; some ids of either side are in none."""
    cells = torch.randperm(V * W)[:M]
    return cells % V, cells // V, torch.rand(M) + 0.1


def make(N=7, V=23, W=31, D=5, E=4, dtype=torch.float64, padding=3):
    torch.manual_seed(0)
    sizes = [(N, D), (V + padding, D), (V + padding,), (N, E), (W + padding, E), (W + padding,)]
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def heads(tensors, V, W, **options):
    _, weight, bias, _, teacher_weight, teacher_bias = tensors
    return Head(weight, bias, vocab_size=V, **options), Head(
        teacher_weight, teacher_bias, vocab_size=W, **options
    )


def run(function, tensors, V, W, projection, **options):
    """Return (total, gradients) with unequal weights of rows and an upstream gradient of 3."""
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    head, teacher_head = heads([*leaves, *tensors[3:]], V, W, softcap=4.0, scale=0.7)
    weight_N = torch.linspace(0.5, 2, len(leaves[0])).to(leaves[0].dtype)
    if function is reference:
        dense = projection.dense().to(leaves[0].dtype)
        total = (weight_N * reference(leaves[0], head, tensors[3], teacher_head, dense, **options)).sum()
    else:
        total = function(leaves[0], head, tensors[3], teacher_head, projection, weight_N, **options)
    (3 * total).backward()
    return [total.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("workspace_bytes", [1, 4000, 2**28], ids=["one row", "some rows", "all rows"])
@pytest.mark.parametrize("temperatures", [{}, {"temperature": 2.0, "teacher_temperature": 0.5}])
def test_matches_the_definition(workspace_bytes, temperatures):
    tensors = make()
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    truth = run(reference, tensors, 23, 31, projection, **temperatures)
    got = run(
        projected_divergence, tensors, 23, 31, projection, workspace_bytes=workspace_bytes, **temperatures
    )
    for value, true in zip(got, truth, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-11)
    assert not got[2][23:].any()


@settings(max_examples=25)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 81), st.integers(0, 2))
def test_shapes_and_projections_of_any_kind(N, V, W, M, padding):
    tensors = make(N, V, W, padding=padding)
    projection = make_projection(*make_entries(V, W, min(M, V * W)), V, W)
    for value, true in zip(
        *(run(f, tensors, V, W, projection) for f in (projected_divergence, reference)), strict=True
    ):
        torch.testing.assert_close(value, true, rtol=1e-8, atol=1e-9)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 ids: small vocabularies cross their boundaries."""
    monkeypatch.setattr(module, "BLOCK", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_eager(dtype, executor, small_blocks):
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    tensors = make(dtype=dtype)
    truth = run(reference, [t.double() for t in tensors], 23, 31, projection)
    eager = run(reference, tensors, 23, 31, projection)
    for name, *values in zip(
        ("total", "dstudent", "dweight", "dbias"),
        run(projected_divergence, tensors, 23, 31, projection),
        eager,
        truth,
        strict=True,
    ):
        assert_within_budget(name, *values)


def test_a_gpu_is_given_operands_of_one_dtype(monkeypatch):
    """There 16-bit tensors are not widened, and a GEMM of two dtypes is an error; here it is played."""

    def like(left, right):
        assert left.dtype == right.dtype
        return left.float() @ right.float()

    monkeypatch.setattr(launch, "INTERPRET", True)
    monkeypatch.setattr(products, "operand", lambda tensor, dtype: tensor)
    monkeypatch.setattr(products, "product", lambda left, right, out: out.copy_(like(left, right)))
    monkeypatch.setattr(products, "add_product", lambda total, left, right: total.add_(like(left, right)))
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    tensors = make(dtype=torch.bfloat16)
    truth = run(reference, [t.double() for t in tensors], 23, 31, projection)
    for value, true in zip(run(projected_divergence, tensors, 23, 31, projection), truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=0.05, atol=0.05)


def test_large_logits_stay_finite(executor):
    tensors = make()
    tensors = [t * 40 for t in tensors[:3]] + [t * 40 for t in tensors[3:]]
    head, teacher_head = heads(tensors, 23, 31)
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    hidden = tensors[0].float().requires_grad_()
    head, teacher_head = (
        Head(h.weight_VD.float(), h.bias_V.float(), vocab_size=h.vocab_size) for h in (head, teacher_head)
    )
    total = projected_divergence(hidden, head, tensors[3].float(), teacher_head, projection, torch.ones(7))
    total.backward()
    assert total.isfinite()
    assert hidden.grad.isfinite().all()


def test_a_permutation_of_the_same_model_is_the_minimum():
    tensors = make(V=23, W=23, D=4)
    order = torch.randperm(23)
    projection = make_projection(order, torch.arange(23), torch.ones(23), 23, 23)
    tensors[3], tensors[4], tensors[5] = tensors[0], tensors[1][order], tensors[2][order]
    total, dhidden, *_ = run(projected_divergence, tensors, 23, 23, projection)
    assert abs(total) < 1e-12
    assert dhidden.abs().max() < 1e-12


def test_a_frozen_head_gets_no_gradient():
    tensors = make()
    head, teacher_head = heads(tensors, 23, 31)
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    hidden = tensors[0].requires_grad_()
    projected_divergence(hidden, head, tensors[3], teacher_head, projection, torch.ones(7)).backward()
    assert hidden.grad.any()
    assert head.weight_VD.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature must be positive and finite: got 0"),
        ({"teacher_temperature": -1}, "teacher_temperature must be positive"),
        ({"row_weight_N": torch.ones(3)}, r"row of student_ND \(7\).*got shape \(3,\)"),
        ({"spoilt": 0}, "student_ND must be finite: row 4"),
        ({"spoilt": 3}, "teacher_NE must be finite: row 4"),
        ({"cast": 0}, "student_ND is torch.float16 but student_head.weight_VD is torch.float"),
        ({"shard": Shard(None, 0)}, "the student's head is divided over processes"),
        ({"vocab_size": 20}, "projection must have 20 ids of the student"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    tensors = make()
    if "spoilt" in change:
        tensors[change.pop("spoilt")][4, 0] = torch.inf
    head, teacher_head = heads(tensors, change.pop("vocab_size", 23), 31)
    if "cast" in change:
        side = change.pop("cast")
        tensors[side] = tensors[side].half()
    head = Head(head.weight_VD, head.bias_V, vocab_size=head.vocab_size, shard=change.pop("shard", None))
    weight_N = change.pop("row_weight_N", torch.ones(7))
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    with pytest.raises(ValueError, match=message):
        projected_divergence(tensors[0], head, tensors[3], teacher_head, projection, weight_N, **change)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (([], [], []), "needs entries"),
        (([0], [31], [1.0]), r"teacher_M must hold ids in \[0, 31\): got 31 to 31"),
        (([-1], [0], [1.0]), r"student_M must hold ids in \[0, 23\)"),
        (([0], [0], [0.0]), "weight_M must be positive"),
    ],
)
def test_a_projection_that_is_none_is_named(entries, message):
    with pytest.raises(ValueError, match=message):
        make_projection(*(torch.tensor(x) for x in entries), 23, 31)


@pytest.mark.parametrize("frozen", [False, True])
def test_torch_finds_the_operation_sound(frozen, monkeypatch):
    tensors = make(N=3, dtype=torch.float32)
    for tensor in tensors[: 1 if frozen else 3]:
        tensor.requires_grad_()
    head, teacher_head = heads(tensors, 23, 31, softcap=4.0)
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    original, calls = module._divergence, []
    monkeypatch.setattr(module, "_divergence", lambda *args: (calls.append(args), original(*args))[1])
    projected_divergence(
        tensors[0], head, tensors[3], teacher_head, projection, torch.rand(3), workspace_bytes=4000
    )
    torch.library.opcheck(original, calls[0])


def test_rows_chosen_inside_a_graph_give_what_eager_gives():
    tensors = make(dtype=torch.float32)
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    keep = torch.tensor([True, False, True, True, False, True, True])

    def chosen(student, weight, bias, teacher, teacher_weight, teacher_bias, keep):
        rows = keep.nonzero()[:, 0]
        head, teacher_head = heads([student, weight, bias, teacher, teacher_weight, teacher_bias], 23, 31)
        one = student.new_ones(len(rows))
        return projected_divergence(student[rows], head, teacher[rows], teacher_head, projection, one)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
        found = [f(*tensors, keep) for f in (chosen, compiled)]
    torch.testing.assert_close(found[0], found[1])
    gradients = [torch.autograd.grad(value, leaves) for value in found]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_second_derivative_is_refused():
    tensors = make(dtype=torch.float32)
    head, teacher_head = heads(tensors, 23, 31)
    student = tensors[0].requires_grad_()
    projection = make_projection(*make_entries(23, 31, 60), 23, 31)
    total = projected_divergence(student, head, tensors[3], teacher_head, projection, torch.ones(7))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, student, create_graph=True)
