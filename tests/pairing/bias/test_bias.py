"""Covers and biases against their definition, which asks the tokenizer for every continuation there is.

Faults tried, each caught here: a merge of equal rank on the right that crosses; the rank that consumes a
part ignored; the pre-tokenizer ignored; a token that is no merge's result but a piece by itself; the
continuation counted from the wrong byte; own and other cover exchanged; whitespace not set to 1.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairing.definition import cover, cover_by_definition
from tests.tiny import byte_level_bpe, sentencepiece_bpe
from tests.tokenization.tiny import KINDS
from tokenkit.pairing.bias.bias import PairBiases, find_biases, find_pairs
from tokenkit.pairing.bias.covers import find_covers
from tokenkit.pairing.bias.rare import dropped_mass, frequent_continuations
from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.spec import parse_spec
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    folders = {kind: build(root / kind.replace(" ", "-")) for kind, build in KINDS.items()}
    return {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    teacher = load_tokenizer(str(byte_level_bpe(root / "teacher", 330)))
    return teacher, load_tokenizer(str(sentencepiece_bpe(root / "student", 380)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_covers_are_what_the_tokenizer_writes(small, kind):
    tokenizer = small[kind]
    covers = find_covers(tokenizer)
    for token_id, text in enumerate(tokenizer.token_bytes):
        expected = {}
        if text and not tokenizer.is_special_V[token_id] and not text.isspace():
            expected = cover_by_definition(tokenizer, token_id)
        assert cover(tokenizer, covers, token_id) == expected, text


@st.composite
def merge_documents(draw):
    """A byte-level BPE over a, b, 1 with random merges, in or out of order, and pieces that nothing makes."""
    vocab = dict.fromkeys("ab1")
    merges = []
    for _ in range(draw(st.integers(1, 9))):
        left, right = (draw(st.sampled_from(sorted(vocab))) for _ in "xy")
        if left + right not in vocab or draw(st.booleans()):
            merges.append((left, right))
            vocab[left + right] = None
    merges = draw(st.permutations(merges)) if draw(st.booleans()) else merges
    pieces = draw(st.lists(st.text("ab1", min_size=2, max_size=4), max_size=3))
    strings = list(dict.fromkeys([*vocab, *pieces]))
    model = {"type": "BPE", "vocab": {string: i for i, string in enumerate(strings)}, "merges": merges}
    model |= {"ignore_merges": draw(st.booleans())}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    digits = {"type": "Digits", "individual_digits": draw(st.booleans())}
    before = draw(st.sampled_from([whole, {"type": "Sequence", "pretokenizers": [digits, whole]}]))
    return {"model": model, "pre_tokenizer": before, "normalizer": None, "decoder": None}


@settings(max_examples=150, deadline=None)
@given(merge_documents())
def test_covers_hold_for_any_merges(document):
    tokenizer = Tokenizer(parse_spec("any"), {**document, "added_tokens": []}, FAMILIES["GPT2"])
    covers = find_covers(tokenizer)
    for token_id, text in enumerate(tokenizer.token_bytes):
        assert cover(tokenizer, covers, token_id) == cover_by_definition(tokenizer, token_id), text


@pytest.mark.parametrize("name", ["bytelevel2k", "spm1k", "qwen2.5-sub8000", "tinystories-spm", "llama2"])
def test_covers_of_real_tokenizers_on_a_sample(load_real, name):
    tokenizer = load_real(name)
    covers = find_covers(tokenizer)
    chosen = np.random.default_rng(0).choice(tokenizer.vocab_size, 60, replace=False)
    for token_id in chosen.tolist():
        text = tokenizer.token_bytes[token_id]
        if text and not text.isspace() and not tokenizer.is_special_V[token_id]:
            assert cover(tokenizer, covers, token_id) == cover_by_definition(tokenizer, token_id), text


def probabilities(tokenizer, seed):
    numbers = np.random.default_rng(seed).random(tokenizer.vocab_size)
    return numbers / numbers.sum()


@pytest.mark.parametrize("kind", ["BPE", "BPE swapped", "Unigram", "Unigram swapped"])
def test_biases_are_the_mass_that_one_end_alone_rules_out(pair, small, kind):
    if kind.startswith("Unigram"):
        pair = small["unigram"], small["unigram with bytes"]
    teacher, student = pair[::-1] if kind.endswith("swapped") else pair
    teacher_p, student_p = probabilities(teacher, 0), probabilities(student, 1)
    biases = find_biases(teacher, student, teacher_p, student_p)
    covers = {
        tokenizer: {i: cover_by_definition(tokenizer, i) for i in np.unique(ids).tolist()}
        for tokenizer, ids in ((teacher, biases.teacher_P), (student, biases.student_P))
    }
    for i in range(len(biases.teacher_P)):
        a, b = int(biases.teacher_P[i]), int(biases.student_P[i])
        if teacher.token_bytes[a].isspace() or student.token_bytes[b].isspace():
            assert (biases.teacher_bias_P[i], biases.student_bias_P[i]) == (1, 1)
            continue
        ours, theirs = covers[teacher][a], covers[student][b]
        expected = sum(teacher_p[token] for c, token in ours.items() if c not in theirs)
        assert biases.teacher_bias_P[i] == pytest.approx(expected, abs=1e-12)
        expected = sum(student_p[token] for c, token in theirs.items() if c not in ours)
        assert biases.student_bias_P[i] == pytest.approx(expected, abs=1e-12)


def check_bounds(teacher, student, probabilities, least):
    """Compare the biases without rare continuations with the exact ones; return how many differ."""
    exact = find_biases(teacher, student, *probabilities)
    assert exact.error_bounds == (0, 0)
    near = find_biases(teacher, student, *probabilities, min_probability=least)
    sides = list(zip((teacher, student), probabilities, strict=True))
    kept = set().union(*(frequent_continuations(*side, least) for side in sides))
    differ = 0
    for side, bound, name in zip(sides, near.error_bounds, ("teacher", "student"), strict=True):
        short_P = getattr(exact, f"{name}_bias_P") - getattr(near, f"{name}_bias_P")
        mass_P = dropped_mass(*side, kept)[getattr(near, f"{name}_P")]
        assert (short_P >= -1e-12).all()
        assert (short_P <= mass_P + 1e-12).all()
        assert mass_P.max() == bound
        differ += int((short_P > 1e-12).sum())
    return differ


@pytest.mark.parametrize("least", [0.001, 0.003, 0.004, 0.99])
def test_without_rare_continuations_biases_lose_no_more_than_the_bound(pair, least):
    probability = [probabilities(tokenizer, seed) for seed, tokenizer in enumerate(pair)]
    differ = check_bounds(*pair, probability, least)
    assert differ > 0 or least < 0.004


def test_a_bias_without_rare_continuations_by_hand():
    """[a] covers "b" by [ab] and "11" by [a11]; the other tokenizer has no such token."""

    def made(strings, merges):
        model = {"type": "BPE", "vocab": {s: i for i, s in enumerate(strings)}, "merges": merges}
        whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        document = {"model": model, "pre_tokenizer": whole, "normalizer": None, "decoder": None}
        return Tokenizer(parse_spec("any"), {**document, "added_tokens": []}, FAMILIES["GPT2"])

    teacher = made(["a", "b", "1", "ab", "a1", "a11"], [("a", "b"), ("a", "1"), ("a1", "1")])
    student = made(["a", "b", "1", "11"], [("1", "1")])
    probability = np.array([0.5, 0.2, 0.1, 0.15, 0.04, 0.01]), np.array([0.5, 0.3, 0.19, 0.01])
    cases = ((0, 0.2, (0, 0)), (0.03, 0.19, (0.01, 0)), (0.1, 0.15, (0.05, 0.01)), (0.6, 0, (0.2, 0.01)))
    for least, bias, bounds in cases:
        biases = find_biases(teacher, student, *probability, min_probability=least)
        at = (biases.teacher_P == 0) & (biases.student_P == 0)
        assert biases.teacher_bias_P[at] == pytest.approx([bias]), least
        assert biases.error_bounds == pytest.approx(bounds), least


@settings(max_examples=60, deadline=None)
@given(merge_documents(), merge_documents(), st.integers(0, 9), st.sampled_from([0.05, 0.1, 0.2, 0.5]))
def test_the_bound_holds_for_any_merges(first, second, seed, least):
    teacher, student = (
        Tokenizer(parse_spec("any"), {**document, "added_tokens": []}, FAMILIES["GPT2"])
        for document in (first, second)
    )
    check_bounds(teacher, student, [probabilities(teacher, seed), probabilities(student, seed + 1)], least)


def test_pairs_are_all_text_tokens_of_which_one_ends_with_the_other(pair):
    teacher, student = pair
    expected = [
        (a, b)
        for a, x in enumerate(teacher.token_bytes)
        for b, y in enumerate(student.token_bytes)
        if x and y and (x.endswith(y) or y.endswith(x))
        and not (teacher.is_special_V[a] or student.is_special_V[b])
    ]  # fmt: skip
    assert list(zip(*(ids.tolist() for ids in find_pairs(teacher, student)), strict=True)) == expected


def test_a_tokenizer_and_itself_have_no_bias_but_at_whitespace(pair):
    teacher, _ = pair
    p = probabilities(teacher, 0)
    biases = find_biases(teacher, teacher, p, p)
    same = biases.teacher_P == biases.student_P
    blank = np.array([teacher.token_bytes[i].isspace() for i in biases.teacher_P.tolist()])
    assert not biases.teacher_bias_P[same & ~blank].any()
    assert (biases.student_bias_P[same & blank] == 1).all()


def test_a_pair_closes_a_chunk_when_both_biases_are_small():
    ids = np.array([0, 0, 2], np.int32), np.array([1, 3, 0], np.int32)
    biases = PairBiases(*ids, np.array([0.05, 0.0, 0.1]), np.array([0.0, 0.2, 0.1]), (3, 4))
    teacher, student = np.array([0, 0, 2, 1, 2]), np.array([1, 3, 0, 1, 3])
    assert biases.rule(0.1)(teacher, student).tolist() == [True, False, True, False, False]


def test_probabilities_of_another_vocabulary_are_refused(pair):
    teacher, student = pair
    with pytest.raises(ValueError, match=r"student_probability_V must hold one number per token \(380\)"):
        find_biases(teacher, student, probabilities(teacher, 0), np.ones(3))
