"""linear_divergence inside torch.compile, and torch's own checks of its operations."""

import pytest
import torch

from tests.kernels.divergence_cases import index_set, make
from tokenkit.kernels.head.call import unpack
from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.linear_divergence import operation as module
from tokenkit.structs import Head


def loss(student, weight, bias, teacher, teacher_weight, upstream, *, mode="recompute", **options):
    """Every mode, in the middle of other operations."""
    if mode == "weighted":
        options["row_weight_N"] = upstream
    value = linear_divergence(
        student * 2,
        Head(weight, bias, vocab_size=20),
        teacher,
        Head(teacher_weight, vocab_size=25),
        **options,
    )
    return value if mode == "weighted" else (value * upstream).sum()


def inputs_of(mode, N=5):
    student, weight, bias, teacher, teacher_weight, _, upstream = make(N, 20, 25)
    trained = [student, teacher] if mode == "rows" else [student, weight, bias, teacher]
    for x in trained:
        x.requires_grad_()
    return (student, weight, bias, teacher, teacher_weight, upstream), trained


def test_a_compiled_loss_equals_eager_for_any_number_of_rows():
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    options = index_set("rest", 20, 25) | {"mode": "weighted", "kind": "js"}
    for N in (5, 3):
        inputs, trained = inputs_of("weighted", N)
        expected, value = loss(*inputs, **options), compiled(*inputs, **options)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, trained), torch.autograd.grad(expected, trained)
        )


def test_rows_chosen_inside_the_graph():
    """Their number is known to nobody when the graph is made."""

    def chosen(student, weight, teacher, teacher_weight, keep):
        rows = keep.nonzero()[:, 0]
        heads = Head(weight), Head(teacher_weight)
        return linear_divergence(student[rows], heads[0], teacher[rows], heads[1]).sum()

    student, weight, _, teacher, _, _, _ = make(6, 20, 20)
    teacher_weight = torch.randn(23, 6)
    student.requires_grad_()
    weight.requires_grad_()
    keep = torch.tensor([True, False, True, True, False, True])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
        found = [f(student, weight, teacher, teacher_weight, keep) for f in (chosen, compiled)]
    gradients = [torch.autograd.grad(value, (student, weight)) for value in found]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow
def test_inductor_compiles_it_too():
    torch._dynamo.reset()
    inputs, trained = inputs_of("recompute")
    options = index_set("map", 20, 25)
    value = torch.compile(loss, fullgraph=True)(*inputs, **options)
    expected = loss(*inputs, **options)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, trained), torch.autograd.grad(expected, trained))


@pytest.mark.parametrize("mode", ["value", "rows", "weighted", "recompute"])
def test_torch_finds_the_operations_sound(mode, monkeypatch):
    calls = []
    original = module._divergence
    monkeypatch.setattr(module, "_divergence", lambda *args: (calls.append(args), original(*args))[1])
    inputs, _ = inputs_of(mode)
    if mode == "value":
        inputs = tuple(x.detach() for x in inputs)
    loss(*inputs, mode=mode, **index_set("rest", 20, 25))
    assert unpack(*calls[0][-3:])["mode"] == mode
    torch.library.opcheck(original, calls[0])
