"""The longest old token that ends at each byte, against its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.embeddings.matching import ids_by_bytes
from tokenkit.tokenization.byteify import load_tokenizer
from tokenkit.tokenization.expansion import NONE, expand, expansion_tables

DATA = Path(__file__).parents[3] / "shared" / "data"


def by_definition(ids, by_bytes):
    """At each position the longest token that ends there, all of whose bytes are byte ids."""
    found = []
    for end in range(1, len(ids) + 1):
        matches = []
        for start in range(end):
            piece = ids[start:end]
            if all(0 <= i < 256 for i in piece) and bytes(piece) in by_bytes:
                matches.append((len(piece), by_bytes[bytes(piece)]))
        found.append(max(matches)[1] if matches else NONE)
    return found


def tensors(by_bytes):
    tables = expansion_tables(by_bytes)
    return torch.from_numpy(tables.edge_key_E), torch.from_numpy(tables.token_E)


def test_the_cat():
    words = [b"t", b"h", b"e", b" ", b"c", b"a", b"th", b"the", b" c", b" ca", b" cat", b"at"]
    by_bytes = {word: index for index, word in enumerate(words)}
    ids = torch.tensor([list(b"the cat")])
    (got,) = expand(ids, *tensors(by_bytes)).tolist()
    assert [words[i] for i in got] == [b"t", b"th", b"the", b" ", b" c", b" ca", b" cat"]


def test_what_is_no_byte_has_none_and_ends_what_stands_before_it():
    by_bytes = {b"a": 7, b"aa": 8, b"b": 9}
    ids = torch.tensor([[97, 97, 256, 97, 98, 300, -1, 97, 120, 97]])
    assert expand(ids, *tensors(by_bytes)).tolist() == [[7, 8, NONE, 7, 9, NONE, NONE, 7, NONE, 7]]


def test_a_row_does_not_look_into_the_row_before():
    ids = torch.tensor([[98, 97], [97, 98]])
    assert expand(ids, *tensors({b"aa": 1, b"ba": 2})).tolist() == [[NONE, 2], [NONE, NONE]]


def test_no_token_at_all_is_refused():
    with pytest.raises(ValueError, match="got none"):
        expansion_tables({b"": 3})


@settings(max_examples=150, deadline=None)
@given(
    words=st.sets(
        st.binary(min_size=1, max_size=5).map(lambda raw: bytes(b % 3 + 97 for b in raw)), min_size=1
    ),
    rows=st.lists(
        st.lists(st.sampled_from([97, 98, 99, 255, 256, -1]), min_size=12, max_size=12), min_size=1
    ),
)
def test_it_is_the_definition(words, rows):
    by_bytes = {word: 10 * index for index, word in enumerate(sorted(words))}
    got = expand(torch.tensor(rows), *tensors(by_bytes)).tolist()
    assert got == [by_definition(ids, by_bytes) for ids in rows]


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(1, 39))
def test_a_window_of_the_longest_token_is_enough(raw, new):
    words = {b"ab", b"abab", b"b", b"bababa", b"\x00\x01", *(bytes([i]) for i in range(256))}
    tables = expansion_tables({word: index for index, word in enumerate(sorted(words))})
    arrays = torch.from_numpy(tables.edge_key_E), torch.from_numpy(tables.token_E)
    ids = torch.tensor([[97 + byte % 2 for byte in raw]])
    new = min(new, len(raw))
    window = ids[:, -(new + tables.max_bytes - 1) :]
    assert torch.equal(expand(window, *arrays)[:, -new:], expand(ids, *arrays)[:, -new:])


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2.5"])
def test_real_vocabularies(name):
    if not (DATA / "tokenizers" / name).exists():
        pytest.skip("no real tokenizers: ../shared/data is absent")
    tokenizer = load_tokenizer(str(DATA / "tokenizers" / name))
    by_bytes = ids_by_bytes(tokenizer)
    tables = expansion_tables(by_bytes)
    assert (np.diff(tables.edge_key_E) > 0).all()
    assert tables.max_bytes == max(map(len, by_bytes))
    text = "Hello, naïve world!   \n\n\n    def main():  東京は🙂 1984年 " + " " * 150 + "-" * 90 + " the end"
    ids = [*text.encode(), 256, *b" world"]
    got = expand(torch.tensor([ids]), torch.from_numpy(tables.edge_key_E), torch.from_numpy(tables.token_E))
    assert got[0].tolist() == by_definition(ids, by_bytes)
