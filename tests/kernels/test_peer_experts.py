"""Tiny experts against all of their rows at once in float64, through torch's and Triton's lines.

Faults tried, each caught here: an expert's row without its stride; act' at g·s; the gate left out of the
gradient of either table; a pair's second neuron with the first one's factor; an expert of many pairs
that stops at the end of a stretch; a row that nobody takes left unwritten.
"""

import pytest
import torch

from tokenkit.kernels import table_rows
from tokenkit.kernels.peer_experts import peer_experts
from tokenkit.kernels.reference.peer_experts import peer_experts as reference

SHAPES = [(5, 6, 30, 1, 48), (3, 4, 9, 3, 80), (7, 8, 40, 1, 96), (2, 5, 7, 2, 33)]  # N, P, E, M, D
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])


def case(shape, dtype=torch.float32, device="cpu"):
    N, P, E, M, D = shape
    hidden, down, up = torch.randn(N, D), torch.randn(E, M, D) / D**0.5, torch.randn(E, M, D)
    expert = torch.randint(E, (N, P), dtype=torch.int32)
    gate = torch.randn(N, P, dtype=torch.promote_types(dtype, torch.float32))
    return [x.to(device, dtype) for x in (hidden, down, up)] + [expert.to(device), gate.to(device)]


def value_and_gradients(function, inputs, activation, upstream):
    hidden, down, up, expert, gate = inputs
    leaves = [x.detach().requires_grad_() for x in (hidden, down, up, gate)]
    out = function(*leaves[:3], expert, leaves[3], activation)
    return [out.detach(), *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)]


@EVERY_ACTIVATION
@EVERY_SHAPE
def test_matches_float64(shape, activation, executor, device):
    inputs = case(shape, device=device)
    upstream = torch.randn(shape[0], shape[4], device=device)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = value_and_gradients(reference, exact, activation, upstream)
    names = ("value", "hidden", "down", "up", "gate")
    for name, got, expected in zip(
        names, value_and_gradients(peer_experts, inputs, activation, upstream), truth, strict=True
    ):
        torch.testing.assert_close(
            got.double(), expected, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_as_eager(dtype, executor, device):
    inputs = case((16, 12, 40, 1, 64), dtype, device)
    upstream = torch.randn(16, 64, device=device)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = value_and_gradients(reference, exact, "gelu", upstream)
    ours = value_and_gradients(peer_experts, inputs, "gelu", upstream)
    plain = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    eager = value_and_gradients(reference, plain, "gelu", upstream)
    for got, other, expected in zip(ours, eager, truth, strict=True):
        error, allowed = ((x.double() - expected).square().mean().sqrt() for x in (got, other))
        assert error <= 2 * allowed


def test_gradcheck():
    hidden, down, up, expert, gate = case((3, 4, 6, 2, 5), torch.double)
    leaves = [x.requires_grad_() for x in (hidden, down, up, gate)]
    for activation in ("gelu", "silu"):
        assert torch.autograd.gradcheck(
            lambda h, d, u, g, a=activation: peer_experts(h, d, u, expert, g, a), leaves
        )


def test_an_expert_of_many_pairs_and_one_of_none(executor, device, monkeypatch):
    """Of 160 pairs half go to one row, more than one program takes at once; another row is never read."""
    monkeypatch.setattr(table_rows, "STRETCH", 24)
    inputs = case((20, 8, 12, 1, 32), device=device)
    inputs[3][:, ::2] = 5
    inputs[3][inputs[3] == 7] = 5
    upstream = torch.randn(20, 32, device=device)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = value_and_gradients(reference, exact, "gelu", upstream)
    first, again = (value_and_gradients(peer_experts, inputs, "gelu", upstream) for _ in range(2))
    for got, twice, expected in zip(first, again, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(got, twice)
    assert first[2][7].abs().sum() == 0


@pytest.mark.parametrize("stretch", [1, 2, 3, 5, 8, 30])
def test_stretches_of_any_length_give_the_same_sums(stretch, executor, device, monkeypatch):
    """Keys that begin and end inside of stretches, at their borders, and fill several."""
    key = torch.tensor([[3, 0], [3, 3], [1, 3], [3, 5], [5, 3], [0, 3], [3, 5], [5, 5]], device=device)
    hidden, weight = torch.randn(8, 17, device=device), torch.randn(8, 2, device=device)
    monkeypatch.setattr(table_rows, "STRETCH", stretch)
    got = table_rows.segment_sums(hidden, weight, table_rows.ordered(key, 7), torch.float32)
    one_hot = torch.nn.functional.one_hot(key, 7).double()
    expected = torch.einsum("nre,nr,nd->ed", one_hot, weight.double(), hidden.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_the_backward_does_not_hold_rows():
    hidden, down, up, expert, gate = case((50, 16, 40, 1, 64))
    kept = []
    leaves = [x.requires_grad_() for x in (hidden, down, up, gate)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        peer_experts(*leaves[:3], expert, leaves[3])
    assert sum(kept) == sum(x.numel() for x in (hidden, down, up)) + 3 * expert.numel()


def test_frozen_tables_cost_no_gradient():
    hidden, down, up, expert, gate = case((5, 4, 9, 1, 16))
    peer_experts(hidden.requires_grad_(), down, up, expert, gate).sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert down.grad is None


def test_tables_of_one_neuron_may_have_two_dimensions():
    hidden, down, up, expert, gate = case((5, 4, 9, 1, 16))
    flat = peer_experts(hidden, down[:, 0], up[:, 0], expert, gate)
    assert torch.equal(flat, peer_experts(hidden, down, up, expert, gate))


def test_no_tokens(executor, device):
    hidden, down, up, expert, gate = case((0, 4, 9, 1, 16), device=device)
    leaves = [x.requires_grad_() for x in (hidden, down, up, gate)]
    peer_experts(*leaves[:3], expert, leaves[3]).sum().backward()
    assert [x.grad.abs().sum().item() for x in leaves] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(5, 8), r"expected hidden \[N, D\]"),
        (2, torch.randn(9, 2, 16), r"two tables \[E, M, D\]"),
        (4, torch.randn(5, 3), r"both be \[N, P\]"),
        (0, torch.randn(5, 16).half(), "one floating dtype"),
        (4, torch.randn(5, 4).half(), "gates must be torch.float32"),
        (4, torch.randn(5, 4, device="meta"), "must be there too"),
        (5, "tanh", "expected one of gelu, relu, silu"),
    ],
)
def test_bad_input_is_named(place, value, message):
    arguments = [*case((5, 4, 9, 1, 16)), "gelu"]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        peer_experts(*arguments)
