from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pairing.documents import document, documents, tokens
from tokenkit.pairing.align import (
    SideRules,
    align,
    align_batch,
    align_kinds,
    before_whitespace,
    chunk_spans,
    chunks_with,
    drop_chunks,
    join_chunks,
    token_spans,
)
from tokenkit.structs import UNPAIRED
from tokenkit.tokenization.ragged import flatten


def rows(chunk_N, offset_B):
    """Split flat values into one list per document."""
    return [chunk_N[a:b].tolist() for a, b in pairwise(offset_B)]


def chunks_of(student, teacher):
    """The two lists of chunk ids of one document."""
    alignment = align_batch([student], [teacher])
    return alignment.student_N.tolist(), alignment.teacher_M.tolist()


def spelled(side):
    """The axis positions that each token covers, as (start, end); None: no partner."""
    start = 0
    for end in side.byte_ends.tolist():
        if end == UNPAIRED:
            yield None
            continue
        yield start, end
        start = end


def by_definition(student, teacher):
    """Chunk ids of one document, token by token, straight from the definition."""
    wide = [{e for s in spelled(side) if s and s[1] > s[0] for e in s[1:]} for side in (student, teacher)]
    shared = sorted(wide[0] & wide[1])
    sides = []
    for side in (student, teacher):
        ids, waiting = [], []
        for index, span in enumerate(spelled(side)):
            ids.append(-1)
            if span is None:
                continue
            if span[0] == span[1]:
                waiting.append(index)
                continue
            chunk = sum(boundary < span[1] for boundary in shared)
            chunk = -1 if chunk == len(shared) else chunk
            for position in [*waiting, index]:
                ids[position] = chunk
            waiting = []
        sides.append(ids)
    return sides


@given(documents)
def test_the_chunks_are_those_of_the_definition(batch):
    student, teacher = [d[1] for d in batch], [d[2] for d in batch]
    flat_student, flat_teacher = flatten(student), flatten(teacher)
    alignment = align(flat_student, flat_teacher)

    first = alignment.offset_B[:-1]
    for side, flat, number in (
        (alignment.student_N, flat_student, 0),
        (alignment.teacher_M, flat_teacher, 1),
    ):
        for row, offset, pair in zip(
            rows(side, flat.offset_B), first, zip(student, teacher, strict=True), strict=True
        ):
            assert [-1 if c < 0 else c - offset for c in row] == by_definition(*pair)[number]


@given(document())
def test_both_sides_of_a_chunk_spell_the_same_bytes(given_document):
    text, student, teacher = given_document
    ids = chunks_of(student, teacher)
    spelling = []
    for side, chunk in zip((student, teacher), ids, strict=True):
        pieces = {}
        for span, c in zip(spelled(side), chunk, strict=True):
            if span is not None and c >= 0:
                pieces[c] = pieces.get(c, b"") + text[slice(*span)]
        spelling.append(pieces)
    assert spelling[0] == spelling[1]
    assert b"".join(spelling[0].values()) == text[: sum(map(len, spelling[0].values()))]


@given(document())
def test_chunks_are_smallest_and_every_shared_boundary_is_one(given_document):
    _, student, teacher = given_document
    alignment = align_batch([student], [teacher])
    _, end_C = chunk_spans(alignment, flatten([student]))
    wide = [{s[1] for s in spelled(side) if s and s[0] < s[1]} for side in (student, teacher)]
    assert end_C.tolist() == sorted(wide[0] & wide[1])


@given(documents)
def test_ids_grow_within_a_document_and_never_repeat_across_documents(batch):
    student, teacher = flatten([d[1] for d in batch]), flatten([d[2] for d in batch])
    alignment = align(student, teacher)
    for side in (alignment.student_N, alignment.teacher_M):
        assert (np.diff(side[side >= 0]) >= 0).all()
        assert set(side[side >= 0].tolist()) == set(range(alignment.offset_B[-1]))


@given(documents)
def test_swapping_the_sides_swaps_the_chunks(batch):
    student, teacher = flatten([d[1] for d in batch]), flatten([d[2] for d in batch])
    there, back = align(student, teacher), align(teacher, student)
    for mine, other in zip(there, (back[1], back[0], back[3], back[2], back[4]), strict=True):
        np.testing.assert_array_equal(mine, other)


@given(documents, st.randoms(use_true_random=False))
def test_a_document_has_the_same_chunks_in_any_batch(batch, random):
    order = list(range(len(batch)))
    random.shuffle(order)
    student = flatten([batch[i][1] for i in order])
    alignment = align_batch([batch[i][1] for i in order], [batch[i][2] for i in order])
    for row, i, first in zip(
        rows(alignment.student_N, student.offset_B), order, alignment.offset_B, strict=False
    ):
        alone = align_batch([batch[i][1]], [batch[i][2]])
        assert [-1 if c < 0 else c - first for c in row] == alone.student_N.tolist()


@given(documents)
def test_last_tokens_are_the_last_of_their_chunks(batch):
    alignment = align_batch([d[1] for d in batch], [d[2] for d in batch])
    for side, last_C in zip(alignment[:2], alignment[2:4], strict=True):
        assert last_C.tolist() == [np.flatnonzero(side == c)[-1] for c in range(len(last_C))]


@given(documents, st.data())
def test_joined_chunks_are_runs_that_end_where_a_chunk_closes(batch, data):
    student = flatten([d[1] for d in batch])
    alignment = align(student, flatten([d[2] for d in batch]))
    C = len(alignment.student_last_C)
    closes = np.array(data.draw(st.lists(st.booleans(), min_size=C, max_size=C)), np.bool_)
    joined = join_chunks(alignment, closes)

    expected, number = {-1: -1}, 0
    for first, end in zip(alignment.offset_B[:-1], alignment.offset_B[1:], strict=True):
        for c in range(first, end):
            expected[c] = number
            number += closes[c] or c == end - 1
    for before, after in zip(alignment[:2], joined[:2], strict=True):
        assert after.tolist() == [expected[c] for c in before.tolist()]
    for side, last_C in zip(joined[:2], joined[2:4], strict=True):
        assert last_C.tolist() == [np.flatnonzero(side == c)[-1] for c in range(number)]
    assert joined.offset_B[-1] == number


@given(documents)
def test_joining_at_every_chunk_changes_nothing(batch):
    alignment = align_batch([d[1] for d in batch], [d[2] for d in batch])
    joined = join_chunks(alignment, np.ones(len(alignment.student_last_C), np.bool_))
    for before, after in zip(alignment, joined, strict=True):
        np.testing.assert_array_equal(before, after)


@given(documents)
def test_token_spans_tile_each_document(batch):
    student = flatten([d[1] for d in batch])
    start_N, end_N = token_spans(student)
    expected = [s or (-1, -1) for d in batch for s in spelled(d[1])]
    assert list(zip(start_N.tolist(), end_N.tolist(), strict=True)) == expected


def test_hand_made_example():
    assert chunks_of(tokens([4, 8]), tokens([3, 4, 7, 8])) == ([0, 1], [0, 0, 1, 1])


def test_equal_tokenizations_give_one_token_chunks():
    assert chunks_of(tokens([3, 4, 8]), tokens([3, 4, 8])) == ([0, 1, 2], [0, 1, 2])


def test_a_token_of_no_width_joins_the_chunk_that_follows():
    assert chunks_of(tokens([0, 2, 2, 4]), tokens([2, 4])) == ([0, 0, 1, 1], [0, 1])


def test_a_one_sided_bos_is_in_no_chunk():
    assert chunks_of(tokens([UNPAIRED, 2, 4]), tokens([2, 4])) == ([-1, 0, 1], [0, 1])


def test_a_paired_bos_is_a_chunk_of_its_own():
    assert chunks_of(tokens([1, 3]), tokens([1, 2, 3])) == ([0, 1], [0, 1, 1])


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([2, 4], [1, 2, 3, 4, 6, 7], ([0, 1], [0, 0, 1, 1, -1, -1])),
        ([2, 4, 7], [1, 2, 3], ([0, -1, -1], [0, 0, -1])),
        ([3, 5], [1, 2], ([-1, -1], [-1, -1])),
        ([], [1, 2], ([], [-1, -1])),
    ],
    ids=["student cut", "both cut in the middle of a token", "nothing shared", "empty side"],
)
def test_what_truncation_leaves_without_a_partner_is_in_no_chunk(student, teacher, expected):
    assert chunks_of(tokens(student), tokens(teacher)) == expected


def test_a_boundary_inside_a_character_counts_when_both_share_it():
    euro_and_a = "€a".encode()  # three bytes and one
    assert len(euro_and_a) == 4
    assert chunks_of(tokens([1, 3, 4]), tokens([1, 4])) == ([0, 1, 1], [0, 1])


def test_an_empty_document_takes_no_chunk_from_its_neighbours():
    alignment = align_batch([tokens([2]), tokens([]), tokens([1])], [tokens([2]), tokens([1]), tokens([1])])
    assert alignment.student_N.tolist() == [0, 1]
    assert alignment.teacher_M.tolist() == [0, -1, 1]
    assert alignment.offset_B.tolist() == [0, 1, 1, 2]


def test_an_empty_batch_has_no_chunks():
    alignment = align_batch([], [])
    assert [len(part) for part in alignment] == [0, 0, 0, 0, 1]


def test_different_numbers_of_documents_are_an_error():
    with pytest.raises(ValueError, match="got 1 of the student and 2 of the teacher"):
        align_batch([tokens([1])], [tokens([1])] * 2)


@pytest.mark.parametrize("ends", [[2, 1], [2, UNPAIRED, 1]])
def test_falling_ends_name_the_token(ends):
    with pytest.raises(ValueError, match=f"those of the teacher do in document 1 at token {len(ends) - 1}"):
        align_batch([tokens([2])] * 2, [tokens([2]), tokens(ends)])


# ids: 0 the, 1 " cat", 2 "s", 3 " sat", 4 special, 5 unknown, 6 pad
SPACE_V = np.array([False, True, False, True, False, False, False])
RULES = SideRules(SPACE_V, unk_id=5, pad_id=6)


def kinds(student, teacher, mode="identity", kind="space"):
    alignment = align_kinds(flatten([student]), flatten([teacher]), [kind], RULES, RULES, mode)[kind]
    return alignment.student_N.tolist(), alignment.teacher_M.tolist()


def test_space_chunks_join_until_both_next_tokens_begin_with_whitespace():
    student = tokens([3, 7, 8, 12], ids=[0, 1, 2, 3])  # the| cat|s| sat
    teacher = tokens([3, 7, 8, 12], ids=[0, 1, 2, 3])
    assert kinds(student, teacher) == ([0, 1, 1, 2], [0, 1, 1, 2])


def test_whitespace_on_one_side_alone_does_not_close():
    student = tokens([3, 6], ids=[0, 1])  # the|▁cat, its "▁" a dummy prefix that the text does not have
    teacher = tokens([3, 6], ids=[0, 2])
    assert kinds(student, teacher) == ([0, 0], [0, 0])
    assert kinds(teacher, student) == ([0, 0], [0, 0])


def test_a_special_token_closes_its_space_chunk_and_the_tail_stays_open():
    student = tokens([3, 4, 7, 8], ids=[0, 4, 0, 2], special=[0, 1, 0, 0])
    assert kinds(student, student) == ([0, 0, 1, 1], [0, 0, 1, 1])


def unbiased(student, teacher, pairs, mode="identity"):
    def closes(teacher_C, student_C):
        return np.array([pair in pairs for pair in zip(teacher_C.tolist(), student_C.tolist(), strict=True)])

    found = align_kinds(flatten([student]), flatten([teacher]), ["unbiased"], RULES, RULES, mode, closes)
    return found["unbiased"].student_N.tolist(), found["unbiased"].teacher_M.tolist()


def test_unbiased_chunks_join_until_the_pair_of_last_tokens_is_unbiased():
    student = tokens([3, 7, 8, 12], ids=[0, 1, 2, 3])
    teacher = tokens([3, 7, 8, 12], ids=[0, 3, 0, 2])
    assert unbiased(student, teacher, {(3, 1), (2, 3)}) == ([0, 0, 1, 1], [0, 0, 1, 1])
    assert unbiased(student, teacher, {(1, 3), (0, 0)}) == ([0, 1, 1, 1], [0, 1, 1, 1])


def test_a_special_token_closes_its_unbiased_chunk_and_the_word_before_it_when_ignored():
    student = tokens([3, 4, 7, 8], ids=[0, 4, 0, 2], special=[0, 1, 0, 0])
    assert unbiased(student, student, set()) == ([0, 0, 1, 1], [0, 0, 1, 1])
    assert unbiased(student, student, set(), "ignore") == ([0, -1, 2, 2], [0, -1, 2, 2])


def test_the_next_document_is_not_the_next_token():
    one, two = tokens([3], ids=[0]), tokens([4], ids=[1])
    alignment = align(flatten([one, two]), flatten([one, two]))
    flat = flatten([one, two])
    assert before_whitespace(alignment, flat, flat, SPACE_V, SPACE_V).tolist() == [False, False]


def test_a_chunk_with_an_unknown_token_is_dropped_on_both_sides():
    student = tokens([3, 7, 8], ids=[0, 5, 2])
    teacher = tokens([3, 5, 7, 8], ids=[0, 1, 2, 2])
    assert kinds(student, teacher, kind="unconstrained") == ([0, -1, 2], [0, -1, -1, 2])
    assert kinds(teacher, student, kind="unconstrained") == ([0, -1, -1, 2], [0, -1, 2])


def test_a_joined_chunk_with_an_unknown_token_is_dropped_whole():
    student = tokens([3, 7, 8, 12], ids=[0, 1, 5, 3])
    assert kinds(student, student) == ([0, -1, -1, 2], [0, -1, -1, 2])


def test_ignoring_special_tokens_keeps_the_word_before_them():
    student = tokens([3, 4, 7], ids=[0, 4, 0], special=[0, 1, 0])
    assert kinds(student, student, "identity") == ([0, 0, 1], [0, 0, 1])
    assert kinds(student, student, "ignore") == ([0, -1, 2], [0, -1, 2])
    assert kinds(student, student, "ignore", "unconstrained") == ([0, -1, 2], [0, -1, 2])


def test_ignore_pad_drops_padding_alone():
    student = tokens([1, 4, 5], ids=[4, 0, 6], special=[1, 0, 1])
    assert kinds(student, student, "ignore_pad", "unconstrained") == ([0, 1, -1], [0, 1, -1])


def test_a_pad_id_that_text_wrote_is_no_padding():
    student = tokens([1, 4, 5], ids=[4, 0, 6], special=[1, 0, 0])
    assert kinds(student, student, "ignore_pad", "unconstrained") == ([0, 1, 2], [0, 1, 2])


def test_dropped_chunks_leave_the_other_ids_alone():
    student = tokens([1, 2, 3])
    alignment = align_batch([student], [student])
    only_second = np.array([False, True, False])
    dropped = drop_chunks(alignment, chunks_with(alignment, only_second, np.zeros(3, np.bool_)))
    assert dropped.student_N.tolist() == dropped.teacher_M.tolist() == [0, -1, 2]


@pytest.mark.parametrize(
    ("kind", "mode"), [("unbiased", "identity"), ("space", "drop"), ("words", "identity")]
)
def test_unknown_kinds_and_modes_are_an_error(kind, mode):
    with pytest.raises(ValueError, match=r"of the tokenizer pair|special_tokens_mode must|chunk kind must"):
        kinds(tokens([1]), tokens([1]), mode, kind)
