"""Operations inside torch.compile: whole graphs, the same numbers, and the rules of custom operations.

Faults tried, each caught: a fake of the wrong dtype; kept tensors of a fake one column short; a result that
is an argument; a gradient left out; a branch on the number of rows.
"""

import pytest
import torch
from torch._dynamo import config

from tests.losses.example import make_batch, make_states
from tokenkit.kernels import alm_difference, chunk_likelihood
from tokenkit.kernels.head import call as calls
from tokenkit.kernels.linear_logprob import IGNORE
from tokenkit.kernels.linear_logprob import operation as linear_logprob
from tokenkit.kernels.linear_logprob import plan as vocabulary
from tokenkit.losses import alm_loss, clm_loss, make_loss
from tokenkit.structs import Head, HiddenStates

N, V, D = 6, 40, 8


@pytest.fixture(autouse=True)
def rows_of_unknown_number():
    """Rows are chosen by `nonzero`: a graph holds that only if sizes may be unknown to it."""
    torch.compiler.reset()
    with config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


def inputs(*, trains_head=True):
    hidden = torch.randn(N, D, requires_grad=True)
    weight, bias = (torch.randn(*shape, requires_grad=trains_head) for shape in ((V, D), (V,)))
    target = torch.randint(V, (N,))
    target[2] = IGNORE
    return hidden, weight, bias, target, torch.rand(V) < 0.4


@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("mode", ["statistics", "frozen", "cached", "recompute"])
def test_linear_logprob_keeps_the_rules_of_an_operation(mode, subset):
    hidden, weight, bias, target, mask = inputs(trains_head=mode in ("cached", "recompute"))
    if mode == "statistics":
        hidden = hidden.detach()
    parts = list(vocabulary.split_vocabulary(mask[:37])) if subset else []
    head = calls.head_fields(Head(weight, scale=1.2, vocab_size=37), tensors=False)
    call = calls.pack(mode=mode, temperature=1.0, workspace_bytes=1 << 30, head=head)[1:]
    target = target.clamp(max=36)
    if mode == "cached":  # what it keeps depends on the number of rows, which tracing must know
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            linear_logprob._operation, (hidden, weight, bias, target, [], *call), test_utils=tests
        )
        return
    torch.library.opcheck(linear_logprob._operation, (hidden, weight, bias, target, parts, *call))


def test_the_other_operations_keep_the_rules():
    torch.library.opcheck(vocabulary._split_vocabulary, (torch.rand(9) < 0.5,))
    teacher, student = -torch.rand(2, 5), (-torch.rand(2, 5)).requires_grad_()
    torch.library.opcheck(alm_difference._difference, (student, teacher, "renyi", 2.0, 0.3))
    chunk = torch.tensor([[0, 1, 1, -1, 2]])
    layout = chunk_likelihood.lay_out(chunk, chunk, chunk >= 0, chunk >= 0)
    logp = (-torch.rand(1, 5)).requires_grad_()
    start, end, _, slot = layout.student
    torch.library.opcheck(chunk_likelihood._span_sum, (logp, start, end, slot))


def values_and_gradients(function, states):
    value = function(*states)
    wanted = [x for one in states for x in (one.hidden_BTD, one.head.weight_VD) if x.requires_grad]
    return value, torch.autograd.grad(value, wanted, allow_unused=True)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("clm", "inductor"), ("alm, its student's half", "aot_eager"), ("alm", "aot_eager")],
)
def test_a_loss_is_one_graph_and_equals_eager(name, backend):
    batch = make_batch()
    student, teacher = make_states(batch, dtype=torch.float32)
    loss = make_loss("alm_unconstrained")
    prepared = loss.prepare(teacher, batch)
    function = {
        "clm": lambda student: clm_loss(student, batch).total,
        "alm, its student's half": lambda student: loss.loss(student, prepared, batch).total,
        "alm": lambda student: alm_loss(student, teacher, batch, mode="append_space").total,
    }[name]
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    frozen = HiddenStates(student.hidden_BTD, Head(student.head.weight_VD.detach()))
    for states in (student, frozen):
        eager, gradients = values_and_gradients(function, [states])
        found, found_gradients = values_and_gradients(compiled, [states])
        torch.testing.assert_close(found, eager)
        for one, other in zip(found_gradients, gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_one_graph_serves_every_number_of_rows():
    """The rows that a batch needs are counted on the way; a graph of its own for each would never end."""
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, batch: clm_loss(x, batch).total, fullgraph=True, backend=counts)
    for length in (6, 7, 8):
        batch = make_batch(trained=torch.arange(8) < length)
        student, _ = make_states(batch, dtype=torch.float32)
        torch.testing.assert_close(compiled(student, batch), clm_loss(student, batch).total)
    assert counts.frame_count == 1


def test_a_second_derivative_is_refused():
    hidden, weight, bias, target, _ = inputs()
    logp = linear_logprob.linear_logprob(hidden, Head(weight, bias), target).logp_N
    for total in (logp.sum() ** 2, logp.sum()):  # of the sum it would be a constant, in silence
        with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
            torch.autograd.grad(total, hidden, create_graph=True, retain_graph=True)
    student = (-torch.rand(5)).requires_grad_()
    value = alm_difference.alm_difference(-torch.rand(5), student, temperature=1.0)
    (first,) = torch.autograd.grad(value.sum() ** 2, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()
