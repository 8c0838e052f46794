"""Tokenizers drawn at random from a page of text, in a few hundredths of a second each.

    words        of the text, cut at spaces in one of two ways, chosen at random
    substrings   of the words, up to `max_length` characters, with their counts
    chosen       every character, then the best by log(count) + noise, up to a random number of tokens
    segmentation the most probable one of each word, token probability = count / all counts (Unigram)

Words repeat, so each is segmented once per tokenizer. Beside the tokens that segment text, a vocabulary
has distractors, which never occur in it: real vocabularies are full of tokens of other languages, and a
network that never saw any would give them probability.

Source: Minixhofer et al., "Zero-Shot Tokenizer Transfer", 2024 (arXiv:2405.07883), section 3.1.
Dimensions: V tokens, N tokens of a text.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import tokenizers
from numpy.typing import NDArray

from tokenkit.embeddings.hypernet_options import SamplerOptions

PATTERNS = (  # how byte-level BPE cuts words from punctuation and digits; how SentencePiece does not
    re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+|_+|\s"),
    re.compile(r" ?\S+|\s"),
)


@dataclass(frozen=True, slots=True)
class SampledTokenizer:
    """A Unigram tokenizer over words."""

    tokens: list[str]
    """By id."""
    log_probability_V: NDArray[np.float64]
    """Natural logarithm."""
    pattern: re.Pattern[str]
    _backend: tokenizers.Tokenizer
    _known: dict[str, list[int]] = field(default_factory=dict)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Characters that the vocabulary lacks are left out."""
        words_of_each = [self.pattern.findall(text) for text in texts]
        new = list({word for words in words_of_each for word in words if word not in self._known})
        unknown = len(self.tokens)
        for word, encoding in zip(new, self._backend.encode_batch_fast(new), strict=True):
            self._known[word] = [i for i in encoding.ids if i != unknown]
        return [[i for word in words for i in self._known[word]] for words in words_of_each]


def sample_tokenizer(
    texts: Sequence[str], options: SamplerOptions, generator: random.Random
) -> SampledTokenizer:
    """Draw a tokenizer from texts; the same generator state gives the same tokenizer.

    Raises:
        ValueError: texts without a character.
    """
    pattern = generator.choice(PATTERNS)
    count = substring_counts(Counter(word for t in texts for word in pattern.findall(t)), options.max_length)
    if not count:
        raise ValueError("no tokenizer can be drawn from empty texts")
    strings = sorted(count)  # the order of a Counter depends on the order of the texts
    count_K = np.fromiter((count[s] for s in strings), np.float64, len(strings))
    is_character_K = np.fromiter((len(s) == 1 for s in strings), bool, len(strings))
    noise = np.random.default_rng(generator.getrandbits(64))
    sigma = generator.uniform(0, options.noise)
    score_K = np.log(count_K) + sigma * noise.standard_normal(len(strings))
    score_K[is_character_K] = np.inf
    low, high = math.log(options.min_tokens), math.log(options.max_tokens)
    size = max(int(is_character_K.sum()), round(math.exp(generator.uniform(low, high))))
    chosen = np.argsort(-score_K, kind="stable")[:size]
    log_probability_V = np.log(count_K[chosen] / count_K[chosen].sum())
    return unigram([strings[i] for i in chosen], log_probability_V, pattern)


def unigram(
    tokens: list[str], log_probability_V: NDArray[np.float64], pattern: re.Pattern[str]
) -> SampledTokenizer:
    """Return the Unigram tokenizer of these tokens."""
    pieces = [*zip(tokens, log_probability_V.tolist(), strict=True), ("\0", -100.0)]  # the last: unknown
    model = tokenizers.models.Unigram(pieces, unk_id=len(tokens), byte_fallback=False)
    return SampledTokenizer(tokens, log_probability_V, pattern, tokenizers.Tokenizer(model))


def substring_counts(words: Counter[str], max_length: int) -> Counter[str]:
    """Count every substring of up to `max_length` characters, each word as often as it occurs."""
    result: dict[str, int] = {}
    get = result.get
    for word, count in words.items():
        size = len(word)
        for start in range(size):
            for end in range(start + 1, min(size, start + max_length) + 1):
                part = word[start:end]
                result[part] = get(part, 0) + count
    return Counter(result)


def distractors(
    pieces: Sequence[bytes], number: int, max_pieces: int, generator: random.Random
) -> list[bytes]:
    """Return byte strings that are pieces of the old vocabulary strung together at random."""
    found = {b"".join(generator.choices(pieces, k=generator.randint(2, max_pieces))) for _ in range(number)}
    return sorted(found)
