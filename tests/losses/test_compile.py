"""The student's half of every loss inside torch.compile: one graph, the same value and gradients."""

import pytest
import torch
import torch._dynamo.testing

from tests.losses.example import make, make_batch, make_context, make_states
from tokenkit.losses.options import CROSS_TOKENIZER


@pytest.mark.parametrize("name", sorted(CROSS_TOKENIZER))
def test_the_students_half_is_one_graph_and_equals_eager(name):
    batch = make_batch()
    student, teacher = make_states(batch, dtype=torch.float32)
    loss = make(name)
    context = make_context(loss, student, teacher)
    prepared = loss.prepare(teacher, batch, context)

    def total(states):
        return loss.loss(states, prepared, batch, context).total.sum()

    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    wanted = (student.hidden_BTD, student.head.weight_VD)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        found = [f(student) for f in (total, torch.compile(total, fullgraph=True, backend=backend))]
    assert backend.frame_count == 1
    torch.testing.assert_close(found[1], found[0])
    eager, compiled = (torch.autograd.grad(value, wanted, allow_unused=True) for value in found)
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
