"""Covers of Unigram tokenizers, decided by scores, against the definition, which asks the tokenizer.

Faults tried, each caught here: tokens that cross inside the suffix, or end behind it, forgotten; a token's
own spelling forgotten; the cost of the head forgotten; another penalty for unknown characters; ties decided;
heads in another order than their ends'; a word's mark forgotten; a normalizer that changes one character, or
two in a row, trusted; added tokens looked for only as written; the characters of a byte's piece trusted.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairing.definition import cover, cover_by_definition
from tokenkit.pairing.bias.covers import find_covers
from tokenkit.pairing.bias.unigram import is_predictable
from tokenkit.pairing.bias.writing import ByWriting
from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.spec import parse_spec
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer


def replaced(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


MARKS = replaced(" ", "▁")
RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
NORMALIZERS = [
    [],
    [MARKS],
    [{"type": "Strip", "strip_left": True, "strip_right": True}, RUNS, MARKS],
    [{"type": "Strip", "strip_left": False, "strip_right": True}, RUNS],
    [{"type": "Prepend", "prepend": "▁"}, MARKS],
    [{"type": "Lowercase"}, {"type": "NFKC"}, MARKS],
    [{"type": "NFD"}, {"type": "StripAccents"}],
    [replaced("bb", "a"), {"type": "NFC"}],
    [replaced("b", "a")],
]
MIDDLES = [
    [],
    [{"type": "WhitespaceSplit"}],
    [{"type": "Punctuation", "behavior": "Isolated"}],
    [{"type": "Whitespace"}],
    [{"type": "Digits", "individual_digits": False}],
]
CHARACTERS = "ab1é▁A-<"


def unigram(pieces, *, normalizers=(), pre_tokenizers=(), added=(), byte_fallback=False):
    """A Unigram tokenizer of (piece, score), with an unknown token in front and the bytes behind."""
    fallback = [[f"<0x{byte:02X}>", 0.0] for byte in range(256)] if byte_fallback else []
    vocab = [["<unk>", 0.0], *map(list, pieces), *fallback]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": byte_fallback}
    changes = {"type": "Sequence", "normalizers": list(normalizers)}
    cuts = {"type": "Sequence", "pretokenizers": list(pre_tokenizers)}
    document = {
        "model": model,
        "normalizer": changes if normalizers else None,
        "pre_tokenizer": cuts if pre_tokenizers else None,
        "added_tokens": [
            {"id": i, "content": content, "special": special, "normalized": not special, "lstrip": False,
             "rstrip": False, "single_word": False}
            for i, content, special in added
        ],
        "decoder": None,
    }  # fmt: skip
    return Tokenizer(parse_spec("any"), document, FAMILIES["GPT2"])


@st.composite
def tokenizers(draw):
    """A Unigram of a few pieces, with ties or without, and with all that changes or cuts text."""
    strings = draw(st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=8))
    strings += draw(st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=8))
    strings = list(dict.fromkeys(strings))
    numbers = st.integers(-4, 0) if draw(st.booleans()) else st.floats(-20, 0, width=32)
    scores = [float(draw(numbers)) for _ in strings]
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": draw(st.booleans())}
    metaspace["prepend_scheme"] = draw(st.sampled_from(["always", "first", "never"]))
    added = [(0, "<unk>", True)]
    if draw(st.integers(0, 3)) == 0:
        index = draw(st.integers(0, len(strings) - 1))
        added.append((1 + index, strings[index], False))
    return unigram(
        zip(strings, scores, strict=True),
        normalizers=draw(st.sampled_from(NORMALIZERS)),
        pre_tokenizers=[*draw(st.sampled_from(MIDDLES)), *([metaspace] if draw(st.booleans()) else [])],
        added=added,
        byte_fallback=draw(st.booleans()),
    )


def check(tokenizer):
    """Compare the cover of every token with the definition."""
    covers = find_covers(tokenizer)
    for token_id, text in enumerate(tokenizer.token_bytes):
        expected = {}
        if text and not tokenizer.is_special_V[token_id] and not text.isspace():
            expected = cover_by_definition(tokenizer, token_id)
        assert cover(tokenizer, covers, token_id) == expected, text


@settings(max_examples=120, deadline=None)
@given(tokenizers())
def test_covers_hold_for_any_scores_and_pipeline(tokenizer):
    assert is_predictable(tokenizer)
    check(tokenizer)


@pytest.fixture
def asked(monkeypatch):
    """Return the list of (text, bytes of its head, token) that the tokenizer is asked about."""
    questions = []

    def ask(self, text, cut, token_E, original=ByWriting.ask):
        questions.extend((text, cut, token) for token in token_E.tolist())
        original(self, text, cut, token_E)

    monkeypatch.setattr(ByWriting, "ask", ask)
    return questions


def test_many_tokens_share_heads_and_suffixes():
    generator = np.random.default_rng(0)
    strings = {"".join(generator.choice(list("ab1"), n)) for n in range(1, 6) for _ in range(40)}
    scores = -generator.gamma(4, 1, len(strings))
    check(unigram(zip(sorted(strings), scores.tolist(), strict=True)))


@pytest.mark.parametrize("score", [-4.0, -6.0])
def test_a_word_gets_its_mark_in_front(asked, score):
    """Like T5: the space in front of " a" is dropped, its word gets a mark; [▁a][b] or [▁][ab] is better."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    pieces = [("▁", -2.0), ("a", -3.1), ("b", -3.3), ("ab", -6.3), ("▁a", score)]
    tokenizer = unigram(pieces, pre_tokenizers=[{"type": "WhitespaceSplit"}, metaspace])
    check(tokenizer)
    assert not asked
    assert (b"b" in cover(tokenizer, find_covers(tokenizer), 5)) == (score == -6.0)


@pytest.mark.parametrize(("score", "expected"), [(-5.5, 4), (-6.5, None)])
def test_an_unknown_character_costs_10_below_the_lowest_score(asked, score, expected):
    """The lowest is -8: [é][bcd] scores -18 + score, [éb][c][d] -24."""
    tokenizer = unigram([("b", -3.0), ("c", -8.0), ("d", -8.0), ("bcd", score), ("éb", -8.0)])
    check(tokenizer)
    assert not asked
    assert cover(tokenizer, find_covers(tokenizer), 5).get(b"cd") == expected


SPACES = [("▁", -1.5), ("b▁", -1.0), ("▁b", -1.0)]
PIECES = [("a", -3.0), ("b", -3.1), ("ab", -5.0), ("ba", -5.3), ("bab", -7.0)]


def test_a_crossing_token_wins_or_loses_by_its_score(asked):
    """[a][bab] scores -10, and so does [ab][ab]: a little more or less decides without asking."""
    for change, expected in ((0.5, {b"ab": 5}), (-0.5, {})):
        tokenizer = unigram([*PIECES[:4], ("bab", -7.0 + change)])
        check(tokenizer)
        assert not asked
        assert cover(tokenizer, find_covers(tokenizer), 3).items() & {(b"ab", 5)} == expected.items()


def test_ties_are_left_to_the_tokenizer(asked):
    check(unigram(PIECES))
    assert (b"ab", 1, 5) in asked


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ({}, False),
        ({"byte_fallback": True}, False),
        ({"normalizers": [{"type": "Lowercase"}]}, False),
        ({"normalizers": [{"type": "Lowercase"}], "pieces": [("A", -1.0), ("bA", -1.0)]}, True),
        ({"normalizers": [replaced("b", "a")]}, True),
        ({"normalizers": [replaced("bb", "a")], "pieces": [("bb", -1.0)]}, True),
        ({"normalizers": [MARKS], "pieces": [("a▁", -1.0)]}, False),
        ({"normalizers": [MARKS], "added": [(0, "<unk>", True), (6, "▁", False)], "pieces": SPACES}, True),
        ({"normalizers": [{"type": "NFKC"}], "pieces": [("ﬁb", -1.0)]}, True),
        ({"pieces": [("b\u0301", -1.0)]}, True),
        ({"byte_fallback": True, "pieces": [("b<0x41>", -1.0)]}, True),
        ({"added": [(0, "<unk>", True), (5, "bab", False)]}, True),
    ],
)
def test_the_tokenizer_is_asked_only_where_it_must_be(asked, options, asks):
    options = dict(options)
    pieces = [("a", -3.1), ("b", -3.0), ("ab", -4.3), ("ba", -5.7), ("bab", -9.5), *options.pop("pieces", [])]
    check(unigram(pieces, **options))
    assert bool(asked) == asks


@pytest.mark.parametrize(
    "options",
    [
        {"normalizers": [{"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}]},
        {
            "pre_tokenizers": [
                {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}
            ]
        },
    ],
)
def test_a_pipeline_that_is_not_known_is_asked_for_everything(options):
    tokenizer = unigram(PIECES, **options)
    assert not is_predictable(tokenizer)
    check(tokenizer)


def test_covers_are_the_same_when_every_candidate_is_asked_for():
    tokenizer = unigram(PIECES)
    for asks_always in (False, True):
        covers = find_covers(tokenizer, asks_always=asks_always)
        assert cover(tokenizer, covers, 1) == {b"b": 3}


def test_covers_of_t5_on_a_sample(shared_data, asked):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "t5-small"))
    covers = find_covers(tokenizer)
    assert len(asked) < 1000
    for token_id in range(7, tokenizer.vocab_size, 6000):
        text = tokenizer.token_bytes[token_id]
        if text and not text.isspace() and not tokenizer.is_special_V[token_id]:
            assert cover(tokenizer, covers, token_id) == cover_by_definition(tokenizer, token_id), text
