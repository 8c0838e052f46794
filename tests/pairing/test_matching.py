"""Tokens that mean the same: by bytes, by role, and through the other tokenizer."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from tests.tiny import byte_level_bpe, sentencepiece_bpe
from tokenkit.pairing.matching import matching_tokens, projection_entries
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return load_tokenizer(str(sentencepiece_bpe(folder / "s"))), load_tokenizer(
        str(byte_level_bpe(folder / "t"))
    )


def test_pairs_are_equal_bytes_or_equal_roles_and_no_id_comes_twice(pair):
    student, teacher = pair
    pairs = matching_tokens(student, teacher)
    roles = {(student.special_ids[r], teacher.special_ids[r]) for r in ("bos", "eos")}
    for s, t in zip(*pairs, strict=True):
        assert (s, t) in roles or student.token_bytes[s] == teacher.token_bytes[t]
    assert len(set(pairs.student_P)) == len(set(pairs.teacher_P)) == len(pairs.student_P)
    assert roles <= {(int(s), int(t)) for s, t in zip(*pairs, strict=True)}
    text = [{t.token_bytes[i] for i in np.flatnonzero(~t.is_special_V) if t.token_bytes[i]} for t in pair]
    assert len(pairs.student_P) == len(text[0] & text[1]) + len(roles)


def test_of_two_tokens_with_the_same_bytes_the_one_that_is_written_counts(pair):
    pieces, letters = pair
    byte, letter = (pieces.document["model"]["vocab"][string] for string in ("<0x61>", "a"))
    assert pieces.token_bytes[byte] == pieces.token_bytes[letter] == b"a"
    assert letter in pieces.encode("xa").ids
    there = dict(zip(*matching_tokens(pieces, letters), strict=True))
    assert letters.token_bytes[there[letter]] == b"a"
    assert byte not in there
    assert byte not in projection_entries(letters, pieces).teacher_M
    assert byte not in projection_entries(pieces, letters).student_M


def test_swapping_the_tokenizers_swaps_the_pairs(pair):
    there, back = matching_tokens(*pair), matching_tokens(*pair[::-1])
    assert set(zip(*there, strict=True)) == {(s, t) for t, s in zip(*back, strict=True)}


def tokenizer(token_bytes, special=(), roles=None):
    """Only what pairs are made of; of equal bytes it writes the first."""
    return SimpleNamespace(
        token_bytes=token_bytes,
        is_special_V=np.array([raw in special for raw in token_bytes]),
        byte_length_V=np.array([len(raw) for raw in token_bytes]),
        special_ids=roles or {},
        try_encode_batch=lambda texts, before: [
            SimpleNamespace(ids=[token_bytes.index(text.encode())]) for text in texts
        ],
    )


def test_a_special_token_is_not_text_that_reads_like_it():
    student = tokenizer([b"<s>", b"a", b"</s>"], [b"<s>", b"</s>"], {"bos": 0, "eos": 2})
    teacher = tokenizer([b"a", b"<s>", b"<|end|>", b"a"], [b"<|end|>"], {"eos": 2})
    pairs = matching_tokens(student, teacher)
    assert [ids.tolist() for ids in pairs] == [[1, 2], [0, 2]]


def test_vocabularies_with_nothing_in_common_are_named():
    with pytest.raises(ValueError, match="share no token"):
        matching_tokens(tokenizer([b"a"]), tokenizer([b"b"]))


def test_equal_tokenizers_match_everywhere(pair):
    teacher = pair[1]
    pairs = matching_tokens(teacher, teacher)
    assert np.array_equal(pairs.student_P, pairs.teacher_P)
    assert len(pairs.student_P) == teacher.vocab_size


def test_tokens_without_a_partner_go_to_the_pieces_that_write_them(pair):
    student, teacher = pair
    pairs, entries = matching_tokens(*pair), projection_entries(*pair)
    partner = dict(zip(*pairs, strict=True))
    rows = {}
    for s, t, weight in zip(*entries, strict=True):
        rows.setdefault(int(s), []).append((int(t), float(weight)))
    assert sum(len(row) > 1 for row in rows.values()) > 20
    for s, row in rows.items():
        assert sum(weight for _, weight in row) == pytest.approx(1)
        if s in partner:
            assert row == [(partner[s], 1)]
        else:
            ids = teacher.try_encode_batch([student.token_bytes[s].decode()], "text")[0].ids.tolist()[:4]
            if len(set(ids)) == len(ids):
                assert [t for t, _ in row] == ids
                ratios = [b / a for (_, a), (_, b) in itertools.pairwise(row)]
                assert ratios == pytest.approx([0.1] * len(ratios))


def test_real_tokenizers_share_most_of_what_is_short(load_real):
    student, teacher = load_real("smollm2"), load_real("gpt2")
    pairs = matching_tokens(student, teacher)
    assert len(pairs.student_P) > 30_000
    entries = projection_entries(student, teacher)
    assert len(np.unique(entries.student_M)) > 0.99 * student.vocab_size


def test_two_roles_of_one_teacher_token_make_one_pair():
    """A teacher whose BOS and EOS are one token faces the student's first of the two alone."""
    student = tokenizer([b"<s>", b"</s>", b"a"], [b"<s>", b"</s>"], {"bos": 0, "eos": 1})
    teacher = tokenizer([b"<|end|>", b"a"], [b"<|end|>"], {"bos": 0, "eos": 0})
    pairs = matching_tokens(student, teacher)
    assert list(zip(*(ids.tolist() for ids in pairs), strict=True)) == [(0, 0), (2, 1)]
