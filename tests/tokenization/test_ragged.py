import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenkit.structs import Tokens
from tokenkit.tokenization.ragged import cut, flatten, joined, no_texts, split, walked_texts


def document(length, first):
    """A document whose tokens are numbered from `first`."""
    ids = np.arange(first, first + length, dtype=np.int32)
    return Tokens(ids, ids.astype(np.int64) + 1, ids % 2 == 0, ids % 3 == 0)


documents = st.lists(st.integers(0, 6), max_size=5).map(
    lambda lengths: [document(length, 10 * number) for number, length in enumerate(lengths)]
)


def rows(side):
    return [[field.tolist() for field in (t.ids, t.byte_ends, t.special, t.trained)] for t in side]


@given(documents)
def test_splitting_undoes_flattening(side):
    assert rows(split(flatten(side))) == rows(side)
    assert rows(split(joined(flatten([tokens]) for tokens in side))) == rows(side)


@given(documents, st.integers(1, 8))
def test_cutting_keeps_the_first_tokens_of_each_document(side, length):
    expected = [[field[:length] for field in row] for row in rows(side)]
    got = cut(flatten(side), length)
    assert rows(split(got)) == expected
    assert got.length_B.tolist() == [min(len(tokens.ids), length) for tokens in side]


def test_replaced_texts_take_the_place_of_others():
    ends = [np.arange(1, n + 1, dtype=np.int64) for n in (2, 1, 3)]
    some = walked_texts([([1, 2], ends[0]), ([3], ends[1])])
    texts = no_texts(3).replaced([2, 0], some).replaced([0], walked_texts([([7, 8, 9], ends[2])]))
    first, second, third = texts.tokens()
    assert second is None
    assert (first.ids.tolist(), third.ids.tolist()) == ([7, 8, 9], [1, 2])
    assert (first.byte_ends.tolist(), third.byte_ends.tolist()) == ([1, 2, 3], [1, 2])
    assert texts.is_spelled_K.tolist() == [True, False, True]
    assert texts.width_K.tolist() == [3, 0, 2]
