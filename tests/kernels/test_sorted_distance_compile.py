"""sorted_distance inside torch.compile, and torch's own checks of its operations."""

import pytest
import torch

from tokenkit.kernels.head.call import head_fields, pack
from tokenkit.kernels.sorted_distance import operation as module
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.structs import Head


def inputs(N=5):
    torch.manual_seed(0)
    student, weight, bias = torch.randn(N, 8), torch.randn(40, 8), torch.randn(40)
    for x in (student, weight, bias):
        x.requires_grad_()
    return student, weight, bias, torch.randn(N, 6), torch.randn(50, 6), torch.arange(N) % 3 != 1


def loss(tensors, *, exact, weighted):
    """Rows chosen by a mask, as the loss chooses them: their number is not known to the compiler."""
    student, weight, bias, teacher, teacher_weight, scored_N = tensors
    rows = scored_N.nonzero()[:, 0]
    value = sorted_distance(
        student[rows] * 2,
        Head(weight, bias, softcap=5.0),
        teacher[rows],
        Head(teacher_weight, vocab_size=48),
        temperature=1.3,
        exact=exact,
        row_weight_N=torch.ones_like(rows, dtype=torch.float32) if weighted else None,
    )
    return (value * 2).sum()


MODES = {"tables": (False, False), "formed": (False, True), "replay": (True, False)}


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_loss_equals_eager_for_any_number_of_rows(mode):
    exact, weighted = MODES[mode]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (5, 8):
        tensors = inputs(N)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            value = compiled(tensors, exact=exact, weighted=weighted)
        expected = loss(tensors, exact=exact, weighted=weighted)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        found, wanted = (torch.autograd.grad(x, tensors[:3]) for x in (value, expected))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_inductor_compiles_it():
    def distance(student, weight, bias, teacher, teacher_weight):
        return sorted_distance(student, Head(weight, bias), teacher, Head(teacher_weight), exact=False)

    torch._dynamo.reset()
    tensors = inputs()[:5]
    with torch.compiler.config.patch(force_disable_caches=True):  # they outlive a change of the fake
        value_N = torch.compile(distance, fullgraph=True)(*tensors)
        found = torch.autograd.grad(value_N.sum(), tensors[:3])
    expected_N = distance(*tensors)
    assert torch.equal(value_N, expected_N)
    for one, other in zip(found, torch.autograd.grad(expected_N.sum(), tensors[:3]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_the_operation_passes_the_checks_of_torch(mode):
    exact, weighted = MODES[mode]
    student, weight, bias, teacher, teacher_weight, _ = inputs(3)
    packed = pack(
        mode=mode,
        exact=exact,
        needs="xwb",
        workspace_bytes=0,
        temperature=1.0,
        row_weight_N=torch.rand(3) if weighted else None,
        teacher_NE=teacher,
        student_head=head_fields(Head(weight, bias, softcap=5.0), tensors=False),
        teacher_head=head_fields(Head(teacher_weight)),
    )
    arguments = (student, weight, bias, *packed)
    torch.library.opcheck(module._operation, arguments)
    if mode == "tables":
        tables = [x.detach() for x in module._operation(*arguments)[1:]]
        detached = [x.detach() for x in (student, weight, bias)]
        arguments = (*detached, torch.rand(3), tables, *packed)
        torch.library.opcheck(module._backward_operation, arguments)
