"""Product-key retrieval against a score of every expert in float64, through torch's and Triton's lines.

Faults tried, each caught here: an index without its stride; parts folded in another order; one pair too few
in the staircase; keys cut off from the gradient; softmax's gradient without its mean; heads that share keys
read apart; padding keys that win.
"""

import pytest
import torch

from tokenkit.kernels.kinds import GATES
from tokenkit.kernels.product_key_topk import MASS_UNITS, count_usage, product_key_topk, staircase
from tokenkit.kernels.reference.product_key_topk import all_scores
from tokenkit.kernels.reference.product_key_topk import product_key_topk as reference

SHAPES = [  # N, H, keys per part, width of a part, K, whether heads share the keys
    (5, 2, (8, 8), 16, 4, True),
    (7, 2, (40, 24), 16, 8, False),
    (3, 1, (17, 33), 32, 16, True),
    (9, 1, (5, 3, 4), 16, 3, True),
    (4, 2, (4, 5, 3, 6), 16, 2, False),
    (18, 2, (9,), 16, 5, True),
]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gates(executor):
    """All, but in Triton's interpreter, which takes seconds: gates are torch's lines whatever runs."""
    return GATES if executor == "torch" else GATES[:1]


def case(shape, dtype=torch.float32, device="cpu"):
    N, H, sizes, width, _, shared = shape
    query = torch.randn(N, H, width * len(sizes), device=device).to(dtype)
    keys = [torch.randn(1 if shared else H, size, width, device=device).to(dtype) for size in sizes]
    return query, keys


@EVERY_SHAPE
def test_finds_what_a_score_of_every_expert_finds(shape, executor, device):
    query, keys = case(shape, device=device)
    K = shape[4]
    for gate in gates(executor):
        expert, weight = product_key_topk(query, keys, K, gate)
        expected, expected_weight = reference(query.double(), [key.double() for key in keys], K, gate)
        torch.testing.assert_close(expert, expected)
        torch.testing.assert_close(weight.double(), expected_weight, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_scored_as_they_are(dtype, executor, device):
    query, keys = case((5, 1, (24, 40), 32, 8, True), dtype, device)
    expert, _ = product_key_topk(query, keys, 8)
    score = all_scores(query.double(), [key.double() for key in keys])
    best = score.topk(8, -1).values
    torch.testing.assert_close(score.gather(-1, expert.long()), best, rtol=1e-5, atol=1e-5)


def test_equal_scores_lose_nothing(executor, device):
    """Small integers make hundreds of ties; whatever is taken must score as the best do, each once."""
    query, keys = case((6, 2, (20, 12), 16, 8, True), device=device)
    query, keys = query.round(), [key.round().clamp(-1, 1) for key in keys]
    expert, _ = product_key_topk(query, keys, 8)
    score = all_scores(query, keys)
    torch.testing.assert_close(score.gather(-1, expert.long()), score.topk(8, -1).values)
    assert all(len(set(row)) == 8 for row in expert.flatten(0, 1).tolist())


@EVERY_SHAPE
def test_gradients_are_those_of_float64(shape, executor, device):
    query, keys = case(shape, device=device)
    leaves = [query, *keys]
    upstream = torch.randn(*query.shape[:2], shape[4], device=device)

    def gradients(function, tensors, gate):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        _, weight = function(tensors[0], tensors[1:], shape[4], gate)
        return torch.autograd.grad((weight * upstream.to(weight.dtype)).sum(), tensors)

    for gate in gates(executor):
        truth = gradients(reference, [leaf.double() for leaf in leaves], gate)
        found, again = (gradients(product_key_topk, leaves, gate) for _ in range(2))
        for got, twice, expected in zip(found, again, truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(got, twice), "no atomics: the same bits every time"


def test_gradcheck():
    query, keys = case((3, 2, (6, 5), 4, 3, False), torch.double)
    tensors = [tensor.requires_grad_() for tensor in (query, *keys)]
    for gate in ("softmax", "sigmoid"):
        assert torch.autograd.gradcheck(
            lambda q, *c, gate=gate: product_key_topk(q, list(c), 3, gate)[1], tensors
        )


def test_random_queries_reach_nearly_all_experts(device):
    """A first index without its stride would reach 31 of 256."""
    query, keys = case((96, 2, (16, 16), 16, 8, True), device=device)
    expert, _ = product_key_topk(query, keys, 8)
    assert len(expert.unique()) > 0.9 * 256
    assert expert.min() >= 0
    assert expert.max() < 256


def test_keys_are_trained_even_where_the_query_is_frozen():
    query, keys = case((4, 2, (6, 6), 8, 3, True))
    keys = [key.requires_grad_() for key in keys]
    product_key_topk(query, keys, 3)[1].square().sum().backward()
    assert all(key.grad.abs().sum() > 0 for key in keys)


def test_frozen_keys_get_no_gradient_and_cost_none():
    query, keys = case((4, 2, (6, 6), 8, 3, True))
    product_key_topk(query.requires_grad_(), keys, 3)[1].square().sum().backward()
    assert query.grad.abs().sum() > 0
    assert keys[0].grad is None


def test_scores_are_held_for_a_few_tokens_at_a_time(monkeypatch):
    """[N, H, E_l] never exists: the largest result of any operation is far below it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found = out if isinstance(out, tuple | list) else [out]
            sizes.extend(x.numel() for x in found if torch.is_tensor(x))
            return out

    monkeypatch.setattr("tokenkit.kernels.product_key_topk.WORKSPACE_BYTES", 2**16)
    query, keys = case((1000, 2, (256, 256), 8, 4, True))
    expert, weight = product_key_topk(query, keys, 4)
    with Sizes():
        again = torch.ops.tokenkit.product_key_topk(query, keys, 4, "softmax")
    assert max(sizes) < 1000 * 2 * 256 / 8
    assert torch.equal(again[0], expert)
    assert torch.equal(again[1], weight)


def test_no_tokens_no_experts(executor, device):
    query, keys = case((0, 2, (6, 6), 16, 4, True), device=device)
    expert, weight = product_key_topk(query.requires_grad_(), [key.requires_grad_() for key in keys], 4)
    assert expert.shape == weight.shape == (0, 2, 4)
    weight.sum().backward()
    assert query.grad.shape == query.shape


def test_the_staircase_holds_every_pair_that_can_win():
    assert [len(staircase(K)[0]) for K in (4, 8, 16, 32, 64)] == [8, 20, 50, 119, 280]


def test_usage_is_the_count_of_the_ids_and_the_sum_of_the_gates():
    expert = torch.randint(50, (30, 8), dtype=torch.int32)
    gate = torch.rand(30, 8)
    count, mass = torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)
    count_usage(expert, gate, count, mass)
    count_usage(expert, gate, count, mass)
    assert torch.equal(count, 2 * expert.flatten().bincount(minlength=50))
    expected = torch.zeros(50).index_add_(0, expert.flatten(), 2 * gate.flatten())
    torch.testing.assert_close(mass / MASS_UNITS, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "max"}, "expected one of softmax, relu, sigmoid"),
        ({"K": 7}, "fewest keys of a part: got 7"),
        ({"keys": []}, "no keys"),
        ({"keys": [torch.randn(1, 6, 8)]}, r"\[H or 1, E_l, Q / L\]"),
        ({"keys": [torch.randn(3, 6, 8)] * 2}, r"\[H or 1, E_l, Q / L\]"),
        ({"keys": [torch.randn(1, 6, 8).half()] * 2}, "one floating dtype"),
        ({"keys": [torch.randn(1, 6, 8, device="meta")] * 2}, "keys must be there too"),
        ({"keys": [torch.empty(1, 2**16, 8, device="meta")] * 2}, "2\\^31 - 1 experts"),
    ],
)
def test_bad_input_is_named(change, message):
    query, keys = case((4, 2, (6, 6), 8, 3, True))
    arguments = {"query": query, "keys": keys, "K": 3, "gate": "softmax"}
    with pytest.raises(ValueError, match=message):
        product_key_topk(*(arguments | change).values())
