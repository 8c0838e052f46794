"""Which rows face each other, against the same in plain lists.

Faults tried, each caught here or by the losses' own tests: rows one position late at chunk starts; the last
token of the slot instead of the chunk; the loss mask of one side alone; a chunk of two tokens taken for one;
slots counted across documents.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.losses.example import make_batch, make_states, run_loss
from tokenkit.losses.score import check_pairs, chunk_ends, chunk_starts, in_dtype, take
from tokenkit.structs import Batch, Chunks, Side


@st.composite
def batches(draw):
    """Two rows with chunks of any shape, holes in them, and masks."""
    sides, ids = [], []
    for _ in range(2):
        length = draw(st.integers(1, 7))
        rows = []
        for _ in range(2):
            steps = draw(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=length, max_size=length))
            holes = draw(st.lists(st.booleans(), min_size=length, max_size=length))
            row = torch.tensor(steps).cumsum(0)
            row[torch.tensor(holes)] = -1
            rows.append(row)
        chunk = torch.stack(rows)
        mostly = st.sampled_from([True, True, True, False])
        trained = torch.tensor(draw(st.lists(mostly, min_size=2 * length, max_size=2 * length)))
        sides.append(
            Side(torch.zeros(2, length, dtype=torch.long), torch.full((2,), length), trained.view(2, length))
        )
        ids.append(chunk.int())
    return Batch(*sides, {"unconstrained": Chunks(*ids)})


def chunks_by_hand(batch):
    """Yield (row, student positions, teacher positions) of chunks with tokens on both sides."""
    chunks = batch.chunks["unconstrained"]
    for b in range(2):
        student, teacher = chunks.student_BT[b].tolist(), chunks.teacher_BS[b].tolist()
        for k in sorted(set(student) & set(teacher) - {-1}):
            yield (
                b,
                [i for i, x in enumerate(student) if x == k],
                [j for j, x in enumerate(teacher) if x == k],
            )


def flat(batch, found):
    T, S = batch.student.ids_BT.shape[1], batch.teacher.ids_BT.shape[1]
    return [b * T + i for b, i, _ in found], [b * S + j for b, _, j in found]


@given(batches())
def test_ends_are_the_last_tokens_of_chunks_whose_last_tokens_are_trained(batch):
    found = [
        (b, i[-1], j[-1])
        for b, i, j in chunks_by_hand(batch)
        if batch.student.trained_BT[b, i[-1]] and batch.teacher.trained_BT[b, j[-1]]
    ]
    assert [x.tolist() for x in chunk_ends(batch, "unconstrained")] == list(flat(batch, found))


@given(batches(), st.booleans())
def test_starts_are_the_rows_before_chunks_that_are_scored_throughout(batch, one_to_one):
    def is_scored(side, b, positions):
        return all(p > 0 and bool(side.trained_BT[b, p]) for p in positions)

    found = [
        (b, i[0] - 1, j[0] - 1)
        for b, i, j in chunks_by_hand(batch)
        if is_scored(batch.student, b, i) and is_scored(batch.teacher, b, j)
        if not one_to_one or len(i) == len(j) == 1
    ]
    rows = chunk_starts(batch, "unconstrained", one_to_one=one_to_one)
    assert [x.tolist() for x in rows] == list(flat(batch, found))


def test_a_chunk_with_several_tokens_on_either_side_is_not_one_to_one():
    ids = torch.tensor([[0, 1, 1, 2, 3]]), torch.tensor([[0, 1, 2, 2, 3]])
    sides = [Side(x, torch.tensor([5]), torch.ones(1, 5, dtype=torch.bool)) for x in ids]
    batch = Batch(*sides, {"unconstrained": Chunks(*ids)})
    rows = chunk_starts(batch, "unconstrained", one_to_one=True)
    assert [x.tolist() for x in rows] == [[3], [3]]


def test_a_leading_bos_is_an_end_but_no_start():
    batch = make_batch()
    assert chunk_ends(batch, "unconstrained").student_N[0] == 0
    assert chunk_starts(batch, "unconstrained").student_N[0] == 0  # it predicts chunk 1
    assert len(chunk_starts(batch, "unconstrained").student_N) == 8  # chunks 1-5 of row 0; 1, 2, 4 of row 1


def test_states_of_another_batch_are_named():
    batch = make_batch()
    _, teacher = make_states(batch)
    with pytest.raises(ValueError, match="swapped"):
        take(teacher.hidden_BTD, batch.student, torch.tensor([0]))


def test_a_head_is_cast_only_where_it_must_be():
    head = make_states(make_batch())[0].head
    assert in_dtype(head, torch.float64) is head
    assert in_dtype(head, torch.bfloat16).weight_VD.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([], [], "at least one pair"),
        ([1, 2], [1], "one id for each pair: got 2 and 1"),
        ([0.5], [1], "int64"),
        ([[1]], [[1]], r"shape \(1, 1\)"),
    ],
)
def test_pairs_that_are_none_are_named(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(torch.tensor(student), torch.tensor(teacher))


@pytest.mark.parametrize(
    "name",
    ["clm", "alm_unconstrained", "baseline_dskd", "baseline_uld", "baseline_gold", "baseline_mined"],
)
def test_a_label_in_place_of_an_id_is_refused_where_it_is_trained(name):
    """-100 at a trained position would count as a token that is certain, or as a place in an answer."""
    batch = make_batch()
    states = make_states(batch)
    ids = batch.student.ids_BT.clone()
    ids[1, 3] = -100
    wrong = dataclasses.replace(batch, student=dataclasses.replace(batch.student, ids_BT=ids))
    with pytest.raises(ValueError, match=r"where trained_BT asks for them: got -100 at row 1, position 3"):
        run_loss(name, wrong, *states)
    trained = batch.student.trained_BT.clone()
    trained[1, 3] = False
    masked = dataclasses.replace(wrong.student, trained_BT=trained)
    (total, _), _ = run_loss(name, dataclasses.replace(wrong, student=masked), *states)
    assert total.isfinite().all()
