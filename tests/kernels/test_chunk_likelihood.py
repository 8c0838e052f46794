"""Chunks of a batch against their one-row definitions in lists, on random ids with gaps and holes.

Faults tried, each caught here: a one-sided chunk taken as valid; an unscored token forgotten on either
side; an invalid chunk not closing the one before it; the last token taken from an invalid member; ids
compared across rows; -1 between two tokens of a chunk splitting it; the stretch's end one short; the
upstream gradient of one slot given to its neighbour.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.kernels import chunk_likelihood as module
from tokenkit.kernels import launch
from tokenkit.kernels.chunk_likelihood import chunk_likelihood, group, join, lay_out
from tokenkit.kernels.reference import chunk_likelihood as reference


@st.composite
def sides(draw):
    """One side of a row: rising ids with repeats, gaps and -1s, and which tokens are scored."""
    length = draw(st.integers(1, 12))
    steps = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 9]), min_size=length, max_size=length))
    ids = [sum(steps[: i + 1]) for i in range(length)]
    none = draw(st.lists(st.sampled_from([False, False, False, True]), min_size=length, max_size=length))
    scored = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=length, max_size=length))
    return [-1 if hole else i for i, hole in zip(ids, none, strict=True)], scored


batches = st.lists(st.tuples(sides(), sides()), min_size=1, max_size=3)


def tensors(batch):
    """Pad the rows of a batch to [B, T] and [B, S]."""
    columns = []
    for side in (0, 1):
        for what, fill in ((0, -1), (1, False)):
            rows = [row[side][what] for row in batch]
            width = max(map(len, rows))
            columns.append(torch.tensor([list(r) + [fill] * (width - len(r)) for r in rows]))
    return columns[0], columns[2], columns[1], columns[3]


def as_lists(layout, row):
    """Return the slots of a row as the reference has them, empty ones left out."""
    found = []
    for slot in range(layout.valid_BC.shape[1]):
        student, teacher = (
            (side.slot_BL[row] == slot).nonzero()[:, 0].tolist() for side in (layout.student, layout.teacher)
        )
        if student or teacher:
            found.append(reference.Chunk(student, teacher, bool(layout.valid_BC[row, slot])))
    return found


@given(batches)
def test_slots_are_the_chunks_in_the_order_of_their_ids(batch):
    layout = lay_out(*tensors(batch))
    for row, ((student, scored), (teacher, teacher_scored)) in enumerate(batch):
        chunks = reference.lay_out(student, teacher, scored, teacher_scored, layout.valid_BC.shape[1])
        assert as_lists(layout, row) == [chunk for chunk in chunks if chunk.student or chunk.teacher]


def valid_only(chunks):
    return [chunk for chunk in chunks if chunk.valid]


@given(batches, st.integers(0, 2**24 - 1), st.integers(1, 5))
def test_joins_groups_and_their_sums_follow_the_definition(batch, bits, size):
    layout = lay_out(*tensors(batch))
    C = layout.valid_BC.shape[1]
    closes = torch.tensor([[bool(bits >> (slot % 24) & 1) for slot in range(C)]] * len(batch))
    grouped = group(join(layout, closes), size)
    logp = -torch.rand(layout.student.slot_BL.shape) * 5
    inside = torch.nn.functional.pad(layout.valid_BC, (0, 1)).gather(1, layout.student.slot_BL)
    likelihood = chunk_likelihood(logp.where(inside, 0), grouped.student)
    for row, ((student, scored), (teacher, teacher_scored)) in enumerate(batch):
        chunks = reference.lay_out(student, teacher, scored, teacher_scored, C)
        joined = reference.join(chunks, closes[row, : len(chunks)].tolist())
        expected = valid_only(reference.group(joined, size))
        slots = grouped.valid_BC[row].nonzero()[:, 0].tolist()
        assert valid_only(as_lists(grouped, row)) == expected
        assert [int(grouped.student.last_BC[row, c]) for c in slots] == [c.student[-1] for c in expected]
        assert [int(grouped.teacher.last_BC[row, c]) for c in slots] == [c.teacher[-1] for c in expected]
        assert [int(grouped.teacher_tokens_BC[row, c]) for c in slots] == [len(c.teacher) for c in expected]
        sums = [float(reference.chunk_likelihood(logp[row], c.student)) for c in expected]
        torch.testing.assert_close(likelihood[row, slots], torch.tensor(sums).reshape(-1))
    assert not grouped.teacher_tokens_BC[~grouped.valid_BC].any()


def test_a_group_at_the_end_of_a_row_keeps_its_stretch():
    """Behind a join the slots that are left are empty: the last group's stretch ends at its last member."""
    ids = torch.tensor([[2, 3]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    layout = lay_out(ids, ids, everything, everything)
    logp = torch.tensor([[-1.0, -2.0]])
    for closes in (torch.ones_like(layout.valid_BC), torch.zeros_like(layout.valid_BC)):
        for size in (2, 3):
            grouped = group(join(layout, closes), size)
            sums = chunk_likelihood(logp, grouped.student)[grouped.valid_BC]
            assert sums.sum() == -3


@pytest.mark.parametrize(("at", "broken"), [(0, -torch.inf), (2, -torch.inf), (2, torch.nan)])
def test_what_is_not_finite_stays_in_its_chunk(executor, device, at, broken):
    layout = lay_out(*(x.to(device) for x in example()))
    logp = torch.tensor([[0, -1, -2, -3, 0], [-4, -5, 0, 0, 0.0]], device=device)
    expected = chunk_likelihood(logp, layout.student)
    logp[0, 1 + at] = broken
    got = chunk_likelihood(logp, layout.student)
    chunk = 0 if at == 0 else 1
    torch.testing.assert_close(got[0, chunk].cpu(), torch.tensor(broken), equal_nan=True)
    got[0, chunk] = expected[0, chunk]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0), (0, 0)])
def test_a_side_without_positions_is_refused(T, S):
    ids, masks = [torch.zeros(2, n).long() for n in (T, S)], [torch.ones(2, n) > 0 for n in (T, S)]
    with pytest.raises(ValueError, match=f"at least one position, .*got T = {T} and S = {S}"):
        lay_out(*ids, *masks)


def test_a_chunk_that_was_left_out_parts_its_neighbours():
    """Id 1 is missing: text that could not be aligned stood there."""
    ids = torch.tensor([[0, 2, 3]])
    layout = lay_out(ids, ids, torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool))
    never = torch.zeros_like(layout.valid_BC)
    assert [chunk.student for chunk in as_lists(join(layout, never), 0)] == [[0], [1, 2]]
    assert [chunk.student for chunk in as_lists(group(layout, 2), 0)] == [[0], [1, 2]]


def example():
    """Row 0: chunks {0}, {1, 2} and an unscored one; row 1: one chunk, padding."""
    student = torch.tensor([[-1, 4, 7, 7, 9], [0, 0, -1, -1, -1]], dtype=torch.int32)
    teacher = torch.tensor([[4, 4, 7, 9], [0, -1, -1, -1]], dtype=torch.int32)
    student_scored = torch.tensor([[False, True, True, True, False], [True, True, False, False, False]])
    return student, teacher, student_scored, teacher >= 0


def test_sums_and_gradients_by_hand(executor, device):
    layout = lay_out(*(x.to(device) for x in example()))
    logp = torch.tensor([[0, -1, -2, -3, 0], [-4, -5, 0, 0, 0.0]], device=device, requires_grad=True)
    likelihood = chunk_likelihood(logp, layout.student)
    assert layout.valid_BC[:, :3].tolist() == [[True, True, False], [True, False, False]]
    assert likelihood[0, :2].tolist() == [-1, -5]
    assert likelihood[1, :1].tolist() == [-9]
    weight = torch.arange(1.0, 1 + likelihood.numel(), device=device).view_as(likelihood)
    (likelihood * weight * layout.valid_BC).sum().backward()
    assert logp.grad.tolist() == [[0, 1, 2, 2, 0], [10, 10, 0, 0, 0]]


@settings(max_examples=15)
@given(batches)
def test_triton_and_torch_agree(batch):
    layout = lay_out(*tensors(batch))
    logp = -torch.rand(layout.student.slot_BL.shape)
    start, end, _, slot = layout.student
    expected = module._span_sum(logp, start, end, slot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRET", not torch.cuda.is_available())
        patch.setattr(module, "BLOCK_C", 16)
        torch.testing.assert_close(module._span_sum(logp, start, end, slot), expected)


def test_long_rows_keep_float32s_precision():
    """Differences of one float32 running sum over 4096 tokens would be off by 1e-3."""
    ids = torch.arange(4096).div(3, rounding_mode="floor")[None]
    scored = torch.ones_like(ids, dtype=torch.bool)
    logp = -torch.rand(1, 4096) * 10
    likelihood = chunk_likelihood(logp, lay_out(ids, ids, scored, scored).student)
    truth = torch.zeros(1, 1366, dtype=torch.double).index_add(1, ids[0], logp.double())
    torch.testing.assert_close(likelihood[:, :1366].double(), truth, rtol=1e-6, atol=1e-6)


def test_a_sum_above_zero_counts_as_zero():
    ids, scored = torch.zeros(1, 1, dtype=torch.int), torch.ones(1, 1, dtype=torch.bool)
    logp = torch.full((1, 1), 1e-6, requires_grad=True)
    likelihood = chunk_likelihood(logp, lay_out(ids, ids, scored, scored).student)
    likelihood.sum().backward()
    assert not likelihood.any()
    assert not logp.grad.any()


def test_bad_input_is_named():
    student, teacher, student_scored, teacher_scored = example()
    layout = lay_out(student, teacher, student_scored, teacher_scored)
    with pytest.raises(ValueError, match="rise from left to right"):
        lay_out(student.flip(1), teacher, student_scored, teacher_scored)
    with pytest.raises(ValueError, match="expected ids and masks"):
        lay_out(student, teacher[:1], student_scored, teacher_scored[:1])
    with pytest.raises(ValueError, match="one number per token"):
        chunk_likelihood(torch.zeros(2, 4), layout.student)
    with pytest.raises(ValueError, match="at least 1"):
        group(layout, 0)
