"""Hand-made and random documents in two tokenizations."""

import numpy as np
from hypothesis import strategies as st

from tokenkit.structs import UNPAIRED, Tokens


def tokens(ends, *, ids=None, special=None, trained=None) -> Tokens:
    """Tokens with the given ends; ids count from 0 unless given."""
    n = len(ends)
    return Tokens(
        ids=np.arange(n, dtype=np.int32) if ids is None else np.array(ids, np.int32),
        byte_ends=np.array(ends, np.int64),
        special=np.zeros(n, np.bool_) if special is None else np.array(special, np.bool_),
        trained=np.ones(n, np.bool_) if trained is None else np.array(trained, np.bool_),
    )


def cut(text: bytes, pieces: list[bytes], vocabulary: dict[bytes, int]) -> Tokens:
    """Spell `text` with `pieces`, whose ids come from `vocabulary`, a new one where it is missing."""
    assert b"".join(pieces) == text
    ids = [vocabulary.setdefault(piece, len(vocabulary)) for piece in pieces]
    return tokens(np.cumsum([len(piece) for piece in pieces]), ids=ids)


@st.composite
def tokenization(draw, length: int, may_truncate: bool = True) -> Tokens:
    """A random tokenization of `length` units: with tokens of no width, without partner, truncated."""
    inner = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    ends = [*sorted(inner), length] if length else []
    for _ in range(draw(st.integers(0, 3))):  # tokens of no width
        at = draw(st.integers(0, len(ends)))
        ends.insert(at, ends[at - 1] if at else 0)
    for _ in range(draw(st.integers(0, 2))):
        ends.insert(draw(st.integers(0, len(ends))), UNPAIRED)
    if may_truncate and draw(st.booleans()):
        ends = ends[: draw(st.integers(0, len(ends)))]
    special = [end == UNPAIRED or draw(st.integers(0, 9)) == 0 for end in ends]
    ids = draw(st.lists(st.integers(0, 9), min_size=len(ends), max_size=len(ends)))
    return tokens(ends, ids=ids, special=special)


@st.composite
def document(draw) -> tuple[bytes, Tokens, Tokens]:
    """A random Unicode text's bytes and two random tokenizations of it."""
    text = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=12)).encode()
    return text, draw(tokenization(len(text))), draw(tokenization(len(text)))


documents = st.lists(document(), max_size=4)
