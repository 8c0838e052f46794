import random
import time
from collections import Counter

import pytest

from tests.tiny import TEXT
from tokenkit.embeddings.hypernet_options import SamplerOptions
from tokenkit.embeddings.unigram_sampler import (
    distractors,
    sample_tokenizer,
    substring_counts,
)


def best_score(word, log_probability):
    """The definition: the best of all ways to cut a word into tokens."""
    best = [0.0] + [float("-inf")] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(end):
            score = log_probability.get(word[start:end])
            if score is not None:
                best[end] = max(best[end], best[start] + score)
    return best[-1]


def test_substrings_by_hand():
    counts = substring_counts(Counter({"aab": 2, "b": 3}), 2)
    assert counts == {"a": 4, "aa": 2, "ab": 2, "b": 5}


@pytest.mark.parametrize("seed", range(6))
def test_ids_spell_the_text_in_the_most_probable_way(seed):
    generator = random.Random(seed)
    tokenizer = sample_tokenizer(TEXT, SamplerOptions(min_tokens=20, max_tokens=300), generator)
    assert len(set(tokenizer.tokens)) == len(tokenizer.tokens)
    log_probability = dict(zip(tokenizer.tokens, tokenizer.log_probability_V.tolist(), strict=True))
    encoded = tokenizer.encode_batch(TEXT)
    for text, ids in zip(TEXT, encoded, strict=True):
        assert "".join(tokenizer.tokens[i] for i in ids) == text
    for word in {word for text in TEXT for word in tokenizer.pattern.findall(text)}:
        (ids,) = tokenizer.encode_batch([word])
        score = sum(tokenizer.log_probability_V[i] for i in ids)
        assert score == pytest.approx(best_score(word, log_probability), rel=1e-6)


def test_the_sizes_hold_and_characters_are_always_there():
    characters = {c for text in TEXT for c in text}
    sizes = set()
    for seed in range(20):
        generator = random.Random(seed)
        tokenizer = sample_tokenizer(TEXT, SamplerOptions(min_tokens=10, max_tokens=200), generator)
        assert characters <= set(tokenizer.tokens)
        assert len(tokenizer.tokens) <= max(200, len(characters))
        sizes.add(len(tokenizer.tokens))
    assert len(sizes) > 5


def test_the_same_seed_draws_the_same_tokenizer_and_another_does_not():
    drawn = [sample_tokenizer(TEXT, SamplerOptions(), random.Random(seed)).tokens for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_characters_that_it_has_not_seen_are_left_out():
    tokenizer = sample_tokenizer(["abc abd"], SamplerOptions(min_tokens=1), random.Random(0))
    (ids,) = tokenizer.encode_batch(["aXb"])
    assert "".join(tokenizer.tokens[i] for i in ids) == "ab"


def test_empty_texts_are_refused():
    with pytest.raises(ValueError, match="empty texts"):
        sample_tokenizer(["", ""], SamplerOptions(), random.Random(0))


def test_distractors_are_strings_of_old_pieces():
    found = distractors([b"a", b"\xff"], 50, 3, random.Random(0))
    assert all(2 <= len(raw) <= 3 and set(raw) <= {0x61, 0xFF} for raw in found)
    assert found == distractors([b"a", b"\xff"], 50, 3, random.Random(0))


def test_real_text_takes_less_than_a_second(shared_data):
    text = (shared_data / "text" / "tinystories.train.txt").read_text(encoding="utf-8")
    texts = text.split("<|endoftext|>\n")[:128]
    began = time.process_time()
    tokenizer = sample_tokenizer(texts, SamplerOptions(), random.Random(0))
    encoded = tokenizer.encode_batch(texts)
    assert time.process_time() - began < 1.0
    assert all("".join(tokenizer.tokens[i] for i in ids) == t for t, ids in zip(texts, encoded, strict=True))
