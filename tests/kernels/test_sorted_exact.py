"""The sort of sorted_distance and hybrid_distance, and when it is chosen.

Faults tried, each caught: ties in another order; ids not turned back; the shorter side aligned at its small
end; a piece's rows written to another's; small vocabularies counted in bins; a shard sorted; a second dW
where bins need none; ids sorted along where no gradient is wanted.
"""

import pytest
import torch

from tests.kernels.sorted_cases import make, run
from tokenkit.kernels import hybrid_distance, sorted_distance
from tokenkit.kernels.head.side import side_of
from tokenkit.kernels.reference.sorted_distance import sorted_distance as reference
from tokenkit.kernels.sorted_distance import exact as sorted_exact
from tokenkit.kernels.sorted_distance import rows as sorted_rows
from tokenkit.kernels.sorted_distance import tile as sorted_tile
from tokenkit.structs import Head, Shard


def rows_of(N, V, W, spread, device, dtype=torch.float32):
    """Return states and heads of two models whose logits are normal, N rows of both."""
    logits = [spread * torch.randn(size, N, device=device) for size in (V, W)]
    eye = torch.eye(N, device=device, dtype=dtype)
    return eye, Head(logits[0].to(dtype)), eye, Head(logits[1].to(dtype))


def with_gradient(function, arguments, dtype):
    states, head, teacher, teacher_head = arguments
    weight = head.weight_VD.detach().clone().to(dtype).requires_grad_()
    value = function(
        states.to(dtype), Head(weight), teacher.to(dtype), Head(teacher_head.weight_VD.to(dtype))
    )
    value.sum().backward()
    return value.detach().double(), weight.grad.double()


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(("V", "W"), [(97, 82), (82, 97), (40, 40), (1000, 844), (3, 1), (1, 3)])
def test_small_vocabularies_have_the_gradient_of_the_sort(V, W, spread, device):
    """Bins give a row of equal logits 1e-3 of error in value, and no digit of its gradient."""
    arguments = rows_of(4, V, W, spread, device)
    value, gradient = with_gradient(sorted_distance.sorted_distance, arguments, torch.float32)
    true_value, true_gradient = with_gradient(reference, arguments, torch.float64)
    torch.testing.assert_close(value, true_value, rtol=0, atol=1e-6)
    assert (gradient - true_gradient).norm() <= 3e-4 * true_gradient.norm() + 1e-7


def test_who_sorts_by_himself(monkeypatch):
    monkeypatch.setattr(sorted_exact, "SORTED_VOCAB", 10)
    small, large, cuda = (Head(torch.zeros(size, 2)) for size in (10, 11, 10))
    elsewhere, shard = Head(torch.zeros(11, 2, device="meta")), Head(torch.zeros(5, 2), shard=Shard(None, 0))
    padded = Head(torch.zeros(20, 2, device="meta"), vocab_size=10)
    for pair, keeps_tables, expected in (
        ((small, cuda), False, True),
        ((small, small), True, True),
        ((padded, padded), True, True),
        ((small, large), False, True),
        ((large, small), True, False),
        ((elsewhere, elsewhere), False, False),
        ((shard, small), False, False),
        ((small, shard), False, False),
    ):
        assert sorted_exact.sorts(None, pair, keeps_tables) is expected
        assert sorted_exact.sorts(True, pair, keeps_tables) is True
        assert sorted_exact.sorts(False, pair, keeps_tables) is False


@pytest.mark.parametrize("mode", ["tables", "formed", "frozen"])
def test_a_large_vocabulary_on_a_cpu_keeps_tables_where_a_sort_would_need_a_second_gradient(
    mode, monkeypatch
):
    monkeypatch.setattr(sorted_exact, "SORTED_VOCAB", 8)
    inputs = make(5, 33, 49, 6, "cpu")
    default, bins, exact = (
        run(sorted_distance.sorted_distance, torch.float32, inputs, mode, **options)
        for options in ({}, {"exact": False}, {"exact": True})
    )
    expected = bins if mode == "tables" else exact
    assert all(torch.equal(default[name], expected[name]) for name in default)
    assert not torch.equal(bins["value"], exact["value"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_of_equal_probabilities_the_lowest_id_has_the_first_rank(dtype):
    """p = (¼, ¼, ¼, ¼) against (0.4, 0.3, 0.2, 0.1): the first two are below their partners."""
    one = torch.ones(1, 1, dtype=dtype)
    weight = torch.zeros(4, 1, dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.1], [0.3], [0.4], [0.2]], dtype=dtype).log()
    value = sorted_distance.sorted_distance(one, Head(weight), one, Head(teacher), exact=True)
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor([0.4], dtype=dtype))
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([-0.25, -0.25, 0.25, 0.25], dtype=dtype))


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_move_no_bit(threads, monkeypatch):
    inputs = make(7, 33, 49, 6, "cpu")
    whole = run(sorted_distance.sorted_distance, torch.float32, inputs, "formed", exact=True)
    monkeypatch.setattr(sorted_tile, "PIECE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cut = run(sorted_distance.sorted_distance, torch.float32, inputs, "formed", exact=True)
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


def test_torch_sorts_where_numpy_is_absent(monkeypatch):
    inputs = make(7, 33, 49, 6, "cpu")
    first = run(sorted_distance.sorted_distance, torch.float32, inputs, "formed", exact=True)
    monkeypatch.setattr(sorted_exact, "_HAS_NUMPY", False)
    second = run(sorted_distance.sorted_distance, torch.float32, inputs, "formed", exact=True)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_no_ids_are_sorted_along_where_no_gradient_is_wanted(monkeypatch):
    def refuse(p_NV):
        raise AssertionError("ids were sorted")

    arguments = rows_of(3, 20, 30, 1.0, "cpu")
    expected = reference(*arguments)
    monkeypatch.setattr(sorted_exact, "_sorted_with_ids", refuse)
    found = sorted_distance.sorted_distance(*arguments, exact=True)
    torch.testing.assert_close(found, expected)


def test_a_sort_on_a_cpu_takes_a_row_at_a_time(monkeypatch):
    """Beside the logits of a chunk: its tensors do not grow with the rows that were multiplied together."""
    largest = 0
    keep = sorted_exact._sorted_with_ids

    def note(p_NV):
        nonlocal largest
        largest = max(largest, p_NV.numel())
        return keep(p_NV)

    monkeypatch.setattr(sorted_tile, "PIECE", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(sorted_exact, "_sorted_with_ids", note)
    inputs = make(12, 900, 700, 3, "cpu")
    run(sorted_distance.sorted_distance, torch.float32, inputs, "formed", exact=True)
    assert largest == 900
    sides = [side_of("x", inputs[i], Head(inputs[i + 1])) for i in (0, 3)]
    per_row, fixed = sorted_rows._sorting_bytes(*sides, forms=True)
    assert (per_row, fixed) == (4 * 1600, 32 * 1000)


@pytest.mark.parametrize("exact", [None, True, False])
def test_a_hybrid_distance_chooses_as_well(exact, monkeypatch):
    if exact is None:
        monkeypatch.setattr(sorted_exact, "SORTED_VOCAB", 100)
    states, head, teacher, teacher_head = rows_of(4, 97, 82, 1e-3, "cpu")
    zero_N = torch.zeros(4)
    measure = hybrid_distance.Measure(exact=exact)
    weight = head.weight_VD.clone().requires_grad_()
    hybrid_distance.hybrid_distance(
        (states, Head(weight), zero_N), (teacher, teacher_head, zero_N), torch.ones(4), measure=measure
    ).backward()
    _, true = with_gradient(reference, (states, head, teacher, teacher_head), torch.float64)
    error = (weight.grad.double() - true).norm() / true.norm()
    assert error > 0.05 if exact is False else error < 1e-5
