"""What operations on a head share: how calls travel, how logits are cut, what a GPU notes for later.

Faults tried, each caught: a field inserted before others read by place; a chunk of 239 rows instead of 128
or 256; a group of chunks larger than its budget; a stride of an odd number of elements; a flag that is never
cleared; an id out of range that is looked up.
"""

from types import SimpleNamespace

import pytest
import torch

from tokenkit.kernels import deferred, launch
from tokenkit.kernels.head import tiles
from tokenkit.kernels.head.call import head_fields, head_of, pack, unpack
from tokenkit.kernels.head.side import side_of
from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.kernels.linear_logprob.plan import widths
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.structs import Head


def test_fields_come_back_by_name_whatever_stands_between():
    weight = torch.randn(5, 3)
    fields = {
        "mode": "a word with spaces", "yes": True, "no": False, "count": 3, "factor": 0.25, "none": None,
        "head": {"weight_VD": weight, "bias_V": None, "inner": {"deep": 2.0**40}},
    }  # fmt: skip
    found = unpack(*pack(**fields))
    assert found["head"].pop("weight_VD") is not None
    assert found == {
        "mode": "a word with spaces", "yes": True, "no": False, "count": 3, "factor": 0.25,
        "head": {"inner": {"deep": 2.0**40}},
    }  # fmt: skip
    more = unpack(*pack(before=torch.zeros(1), first=7.0, **fields))
    assert torch.equal(more["head"]["weight_VD"], weight)
    assert (more["count"], more["factor"], type(more["count"])) == (3, 0.25, int)


def test_a_head_survives_with_and_without_its_tensors():
    head = Head(torch.randn(6, 3), torch.randn(6), softcap=2.0, scale=0.5, vocab_size=5)
    whole = head_of(unpack(*pack(head=head_fields(head)))["head"])
    bare = head_of(unpack(*pack(head=head_fields(head, tensors=False)))["head"], head.weight_VD, head.bias_V)
    for found in (whole, bare):
        assert torch.equal(found.weight_VD, head.weight_VD)
        assert torch.equal(found.bias_V, head.bias_V)
        assert (found.softcap, found.scale, found.vocab_size, found.shard) == (2.0, 0.5, 5, None)


@pytest.mark.parametrize(("N", "budget"), [(8192, 1170), (1000, 239), (300, 1000), (5, 0)])
def test_chunks_are_multiples_of_128_where_they_may_be(N, budget):
    for rounded in (False, True):
        found = tiles.chunks(N, 1, budget, rounded=rounded)
        assert [i for rows in found for i in range(rows.start, rows.stop)] == list(range(N))
        assert all(rows.stop - rows.start <= max(budget, 1) for rows in found)
    if len(found) > 1 and budget >= 128:
        assert all((rows.stop - rows.start) % 128 == 0 for rows in found[:-1])


@pytest.mark.parametrize(
    ("row_bytes", "low_bytes", "budget", "rows"),
    [(4 * 280_000, 2 * 128_000, 8 << 30, 8192), (4 * 280_000, 2 * 128_000, 5 << 28, 4096), (40, 20, 200, 5)],
)
def test_a_weight_gradient_adds_up_4096_rows_where_they_fit(row_bytes, low_bytes, budget, rows):
    groups = tiles.grouped(8192, row_bytes, low_bytes, budget)
    assert max(group[-1].stop - group[0].start for group in groups) == rows
    assert [rows for group in groups for rows in group][-1].stop == 8192
    for group in groups:
        waiting = low_bytes * (group[-1].stop - group[0].start)
        largest = row_bytes * max(rows.stop - rows.start for rows in group)
        assert waiting + largest <= max(budget, row_bytes + low_bytes)


def test_rows_of_a_buffer_begin_where_a_copy_engine_can_fetch_them(monkeypatch):
    like = torch.zeros(3, 4)
    assert tiles.Buffer(like).get("z", 3, 113, torch.float32).stride(0) == 113
    monkeypatch.setattr(launch, "INTERPRET", True)
    buffer = tiles.Buffer(like)
    first = buffer.get("z", 3, 113, torch.bfloat16)
    assert (tuple(first.shape), first.stride()) == ((3, 113), (128, 1))
    assert buffer.get("z", 2, 128, torch.bfloat16).data_ptr() == first.data_ptr()


class OnGpu:
    """Hidden states that say they are on a GPU."""

    is_cuda = True

    def __init__(self, N, D):
        self.shape = (N, D)


@pytest.mark.parametrize(
    ("N", "D", "mode", "budget", "expected"),
    [
        (8192, 4096, "statistics", 1 << 33, 1792),
        (2048, 2048, "statistics", 1 << 33, 14_336),
        (64, 4096, "statistics", 1 << 33, 229_120),
        (8192, 4096, "recompute", 1 << 24, 512),
        (64, 4096, "cached", 1 << 33, 8192),
    ],
)
def test_tiles_are_as_wide_as_a_gemm_is_long(N, D, mode, budget, expected):
    side = side_of("x", torch.zeros(1, 1).bfloat16(), Head(torch.zeros(1, 1).bfloat16()))
    columns, backward, ring = widths(side._replace(hidden_ND=OnGpu(N, D)), mode, budget)
    assert columns == expected
    assert backward * N * 4 <= max(tiles.TILE_BYTES, 128 * N * 4)
    assert 1 <= ring <= 16_384 // min(backward, 16_384)


@pytest.mark.parametrize(("gib", "expected"), [(16, 1 << 30), (80, 5 << 30), (141, 8 << 30)])
def test_the_default_budget_is_a_share_of_the_device(gib, expected, monkeypatch):
    memory = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert tiles.default_workspace("cuda:1") == expected
    assert tiles.default_workspace("cpu") == 256 << 20


@pytest.fixture
def nothing_waits(monkeypatch):
    """The host may read no tensor at once, as on a GPU."""
    monkeypatch.setattr(deferred, "waits", lambda tensor: False)
    deferred.take(torch.device("cpu"))
    yield
    deferred.take(torch.device("cpu"))


def test_a_number_that_is_not_finite_is_raised_where_the_host_waits(nothing_waits):
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    hidden[2, 3] = torch.nan
    result = linear_logprob(hidden, Head(weight), torch.zeros(4, dtype=torch.int64))
    assert result.logp_N[2].isnan()
    with pytest.raises(NotFiniteError, match="hidden_ND and its head must be finite: row 2"):
        deferred.raise_found()
    deferred.raise_found()  # it was said


def test_of_no_row_nothing_is_noted(nothing_waits):
    result = linear_logprob(torch.randn(0, 8), Head(torch.randn(9, 8)), torch.zeros(0, dtype=torch.int64))
    assert result.logp_N.shape == (0,)
    deferred.raise_found()


def test_an_id_out_of_range_is_looked_up_nowhere_and_raised_later(nothing_waits):
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    target = torch.tensor([1, 2, 3, 9_000_000])
    result = linear_logprob(hidden, Head(weight), target, subset_V=torch.arange(9) < 4)
    assert result.logp_N[3] == 0
    with pytest.raises(ValueError, match=r"target_N must hold ids in \[0, 9\) or -100: row 3"):
        deferred.raise_found()
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 10**7])
    linear_divergence(hidden, Head(weight), hidden, Head(weight), teacher_index=index)
    with pytest.raises(ValueError, match=r"teacher_index must hold ids in \[0, 9\): row 8"):
        deferred.raise_found()


def test_flags_travel_with_other_numbers(nothing_waits):
    device = torch.device("cpu")
    deferred.require(torch.tensor([True, False, False]), "a must hold", ValueError)
    deferred.require(torch.tensor([True]), "b must hold", ValueError)
    deferred.require(torch.tensor([True, True, False]), "a must hold", ValueError, first=10)
    flags = deferred.take(device).tolist()
    with pytest.raises(ValueError, match="a must hold: row 12"):
        deferred.raise_found(flags)
    with pytest.raises(ValueError, match=r"a must hold$"):
        deferred.raise_found([2 * x for x in flags], with_rows=False)
    assert not deferred.take(device).any()
