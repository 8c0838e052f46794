"""Continuations too rare to matter, and how much the biases may lose without them.

A continuation is kept if a token that ends with it, of either tokenizer, has at least a given probability;
all others are left out of both covers. Covers then agree on what is kept, so a bias can only lose what its
own token's cover held of the rest: at most the mass of the rare tokens that could ever be in that cover.

    exact - mass(t) <= bias <= exact      mass(t) = sum of P(s + c) over suffixes s of t and dropped c

Dimensions: V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from tokenkit.tokenization.tokenizer import Tokenizer

Floats = NDArray[np.float64]


def frequent_continuations(tokenizer: Tokenizer, probability_V: Floats, least: float) -> set[bytes]:
    """Return what can follow inside the text tokens of probability `least` or more."""
    texts = tokenizer.token_bytes
    frequent_V = (probability_V >= least) & ~tokenizer.is_special_V
    return {texts[i][cut:] for i in np.flatnonzero(frequent_V).tolist() for cut in range(1, len(texts[i]))}


def dropped_mass(tokenizer: Tokenizer, probability_V: Floats, kept: set[bytes]) -> Floats:
    """Return by how much a bias of each token may fall if covers hold no continuation but `kept`, [V]."""
    mass: dict[bytes, float] = defaultdict(float)
    for token_id in np.flatnonzero(~tokenizer.is_special_V).tolist():
        text, probability = tokenizer.token_bytes[token_id], float(probability_V[token_id])
        for cut in range(1, len(text)):
            if text[cut:] not in kept:
                mass[text[:cut]] += probability
    return np.array(
        [sum(mass.get(text[cut:], 0.0) for cut in range(len(text))) for text in tokenizer.token_bytes]
    )
