"""The longest old token that ends at each byte, against its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tokenkit.tokenization.expansion import NONE, expand, expansion_tables
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.tokenization.written import ids_by_bytes

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
    return as_arguments(expansion_tables(by_bytes))


def as_arguments(tables):
    arrays = tables.block_key_P, tables.edge_key_E, tables.token_E
    return *map(torch.from_numpy, arrays), tables.max_bytes


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
    for other in (-1, -100, 256, 257, 258, 259, 2**40):  # names of blocks are no bytes, nor is what is masked
        ids = torch.tensor([[97, other, 97]])
        assert expand(ids, *tensors({**by_bytes, b"aaaa": 3, b"bab": 4})).tolist() == [[7, NONE, 7]]


def test_a_negative_id_does_not_borrow_from_the_key_beside_it():
    # with one block N is 258, and 97 * N - 100 would be the key 96 * N + 158 of this token
    assert expand(torch.tensor([[-100, 97]]), *tensors({bytes([158, 96]): 5})).tolist() == [[NONE, NONE]]


def test_a_row_does_not_look_into_the_row_before():
    ids = torch.tensor([[98, 97], [97, 98]])
    assert expand(ids, *tensors({b"aa": 1, b"ba": 2})).tolist() == [[NONE, 2], [NONE, NONE]]


def test_no_token_at_all_is_refused():
    with pytest.raises(ValueError, match="got none"):
        expansion_tables({b"": 3})


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([97, 98, 97, 98, 255, 256, -1, -100]), min_size=12, max_size=12), min_size=1
    ),
    cuts=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), min_size=1, max_size=12),
    words=st.sets(st.binary(min_size=1, max_size=5).map(lambda raw: bytes(b % 3 + 97 for b in raw))),
)
def test_it_is_the_definition(rows, cuts, words):
    text = bytes(i for row in rows for i in row if 0 <= i < 256) or b"a"
    words |= {text[start % len(text) :][:length] for start, length in cuts}
    by_bytes = {word: 10 * index for index, word in enumerate(sorted(words))}
    got = expand(torch.tensor(rows), *tensors(by_bytes)).tolist()
    assert got == [by_definition(ids, by_bytes) for ids in rows]


@pytest.mark.parametrize("lengths", [[1], [1, 2], [3], [4, 7], [1, 8, 9], [15, 16, 17], [31, 5]])
def test_every_length_of_a_token(lengths):
    by_bytes = {b"a" * length: length for length in lengths}
    rows = [[97] * 40, [98, *[97] * 39]]
    got = expand(torch.tensor(rows), *tensors(by_bytes)).tolist()
    assert got == [by_definition(ids, by_bytes) for ids in rows]


def test_nothing_is_asked_of_the_device_on_the_way():
    by_bytes = {b"a": 0, b"ab": 1, b"cab": 2, b"bcabc": 3}
    ids = torch.tensor([[97, 98, 99, 97, 98, 99, 256, 98]])
    *arrays, max_bytes = tensors(by_bytes)
    expected = expand(ids, *arrays, max_bytes)
    with FakeTensorMode() as mode:  # has shapes but no values: whatever reads one fails
        got = expand(mode.from_tensor(ids), *map(mode.from_tensor, arrays), max_bytes)
        with pytest.raises(DataDependentOutputException):
            bool((got >= 0).any())
    assert got.shape == expected.shape
    compiled = torch.compile(expand, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, *arrays, max_bytes), expected)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(1, 39))
def test_a_window_of_the_longest_token_is_enough(raw, new):
    words = {b"ab", b"abab", b"b", b"bababa", b"\x00\x01", *(bytes([i]) for i in range(256))}
    tables = expansion_tables({word: index for index, word in enumerate(sorted(words))})
    arrays = as_arguments(tables)
    ids = torch.tensor([[97 + byte % 2 for byte in raw]])
    new = min(new, len(raw))
    window = ids[:, -(new + tables.max_bytes - 1) :]
    assert torch.equal(expand(window, *arrays)[:, -new:], expand(ids, *arrays)[:, -new:])


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2.5"])
def test_real_vocabularies(name):
    if not (DATA / "tokenizers" / name).exists():
        pytest.skip("no real tokenizers: set TOKENKIT_DATA")
    tokenizer = load_tokenizer(str(DATA / "tokenizers" / name))
    by_bytes = ids_by_bytes(tokenizer)
    tables = expansion_tables(by_bytes)
    for key_K in (tables.block_key_P, tables.edge_key_E):
        assert (np.diff(key_K) > 0).all()
    assert tables.max_bytes == max(map(len, by_bytes))
    text = "Hello, naïve world!   \n\n\n    def main():  東京は🙂 1984年 " + " " * 150 + "-" * 90 + " the end"
    ids = [*text.encode(), 256, *b" world"]
    got = expand(torch.tensor([ids]), *as_arguments(tables))
    assert got[0].tolist() == by_definition(ids, by_bytes)
