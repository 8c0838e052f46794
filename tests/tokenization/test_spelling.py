"""The comparison of a whole batch with its text, against joining the bytes of each text.

Faults tried, each caught here: the words behind the first not compared, a place one byte off, a text's
added space not taken off its ends, a special token taken for its string, the mask of the last word one
byte short, and a wrong text blamed on its neighbour.
"""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from tokenkit.tokenization.ragged import Speller, place_bytes

PIECES = [
    b"a",
    b" ",
    b" a",
    b"ab",
    b"",
    b"b" * 8,
    b"b" * 9,
    b"ab" * 8,
    b"ab" * 12,
    b"\0",
    b"<s>",
    "é".encode(),
]
SPECIAL = {PIECES.index(b"<s>"), PIECES.index(b"")}  # the second stands for an id that nothing has
LENGTHS = np.array([0 if i in SPECIAL else len(piece) for i, piece in enumerate(PIECES)], np.int32)
SPELLER = Speller(PIECES, LENGTHS)

ids = st.lists(st.integers(0, len(PIECES) - 1).filter(lambda i: PIECES[i]), max_size=8)


def joined(token_ids):
    return b"".join(PIECES[i] for i in token_ids)


def damaged(raw, at):
    """The same length, with one byte changed."""
    return raw if not raw else raw[: at % len(raw)] + b"x" + raw[at % len(raw) + 1 :]


@st.composite
def batches(draw):
    """Ids of texts, and texts that they spell, spell behind a space, or do not spell."""
    ids_of_each = draw(st.lists(ids, max_size=6))
    texts = []
    for token_ids in ids_of_each:
        raw = joined(token_ids)
        kind = draw(st.sampled_from(["same", "space", "damaged", "longer", "shorter", "other"]))
        texts.append(
            {
                "same": raw,
                "space": raw[1:] if raw.startswith(b" ") else raw,
                "damaged": damaged(raw, draw(st.integers(0, 200))),
                "longer": raw + b"a",
                "shorter": raw[:-1],
                "other": b"quite another text",
            }[kind]
        )
    return ids_of_each, texts


@given(batches(), st.booleans())
@example(([[0], [PIECES.index(b"<s>")], [0]], [b"a", b"<s>", b"a"]), True)
@example(([[0], [0, PIECES.index(b"")]], [b"a", b"a"]), True)
@example(([[8], [6]], [b"ab" * 12, b"b" * 8 + b"x"]), False)
def test_a_text_is_spelled_where_the_bytes_of_its_tokens_joined_are_the_text(batch, may_add_space):
    ids_of_each, texts = batch
    got = SPELLER.place(ids_of_each, texts, may_add_space=may_add_space)
    for k, (token_ids, text) in enumerate(zip(ids_of_each, texts, strict=True)):
        raw = joined(token_ids)
        has_space = may_add_space and raw == b" " + text
        assert got.is_spelled_K[k] == (not SPECIAL & set(token_ids) and (raw == text or has_space))
        here = slice(got.start_K[k], got.start_K[k] + got.length_K[k])
        assert got.ids_N[here].tolist() == token_ids
        assert got.width_K[k] == len(text)
        if got.is_spelled_K[k]:
            ends = np.cumsum([len(PIECES[i]) for i in token_ids]) - int(has_space)
            assert got.ends_N[here].tolist() == ends.tolist()
    assert (got.ids_N.dtype, got.ends_N.dtype) == (np.int32, np.int64)


@given(st.lists(st.binary(max_size=5), max_size=5))
def test_bytes_are_their_own_ids(texts):
    got = place_bytes(texts)
    for k, text in enumerate(texts):
        here = slice(got.start_K[k], got.start_K[k] + got.length_K[k])
        assert got.ids_N[here].tolist() == list(text)
        assert got.ends_N[here].tolist() == list(range(1, len(text) + 1))
    assert got.is_spelled_K.all()
