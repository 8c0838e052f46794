"""A space in which the tokens of the new vocabulary can be compared before the model knows them.

Either the input embedding of a model that has the new tokenizer, or what the tokens' neighbours in a text
say:

    n_ab     Σ over pairs (a, b) of a document, d ≤ window apart, of (window + 1 − d) / window
    PPMI_ab  max(0, log n_ab − log n_a − log p_b),  n_a = Σ_b n_ab,  p_b ∝ n_b^0.75
    vector_a row a of U √Σ, the largest singular values of PPMI

fastText and word2vec factorise a shifted PMI implicitly; the truncated SVD does it at once and gives the same
vectors every time. Tokens that the text has too rarely have no vector.

Source: Levy, Goldberg and Dagan, "Improving Distributional Similarity with Lessons Learned from Word
Embeddings", TACL 2015 (the smoothing and the root). Dimensions: V new vocabulary, A auxiliary size, S tokens
that have a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

WINDOW, SMOOTHING, MIN_COUNT, SIZE = 5, 0.75, 5, 128


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """One vector for each token of the new vocabulary."""

    vector_VA: Tensor
    """Of any float dtype; rows of tokens that are not known are not read."""
    is_known_V: NDArray[np.bool_]


def vectors_of_model(embedding_VA: Tensor, model_tokenizer: Tokenizer, new: Tokenizer) -> Auxiliary:
    """Take the input embedding of a model that has the new tokenizer, perhaps without the last tokens.

    Raises:
        ValueError: the model has another tokenizer, or fewer rows than its tokenizer has ids.
    """
    count = model_tokenizer.vocab_size
    is_text_V = ~(model_tokenizer.is_special_V[: new.vocab_size] | new.is_special_V[:count])
    same = count <= new.vocab_size and all(
        model_tokenizer.token_bytes[i] == new.token_bytes[i] for i in np.flatnonzero(is_text_V).tolist()
    )
    if not same:
        raise ValueError(
            f"auxiliary_model has the tokenizer {model_tokenizer}, which is not the target {new}: name a "
            "model that was trained with the target tokenizer, or a text with --data"
        )
    if len(embedding_VA) < count:
        raise ValueError(
            f"auxiliary_model has {len(embedding_VA)} rows for a tokenizer of {count} ids: "
            "name a folder whose model and tokenizer belong together"
        )
    return Auxiliary(embedding_VA.detach(), np.arange(new.vocab_size) < count)


def vectors_of_text(
    tokenizer: Tokenizer, texts: Sequence[str], *, seed: int = 0, size: int = SIZE
) -> Auxiliary:
    """Learn vectors from the neighbours of tokens.

    Raises:
        ValueError: fewer than two tokens occur `MIN_COUNT` times.
    """
    canonical = [tokenizer.normalize(text) for text in texts]
    encoded = [tokens for tokens in tokenizer.try_encode_batch(canonical) if tokens is not None]
    documents = [np.asarray(tokens.ids, np.int64) for tokens in encoded]
    count_V = np.zeros(tokenizer.vocab_size, np.int64)
    for ids in documents:
        count_V += np.bincount(ids, minlength=tokenizer.vocab_size)
    is_known_V = (count_V >= MIN_COUNT) & ~tokenizer.is_special_V
    known = np.flatnonzero(is_known_V)
    if len(known) < 2:
        raise ValueError(
            f"data holds {len(documents)} documents in which {len(known)} tokens of {tokenizer} occur at "
            f"least {MIN_COUNT} times: give a longer text"
        )
    place_V = np.full(tokenizer.vocab_size, -1, np.int64)
    place_V[known] = np.arange(len(known))
    ppmi_SS = _ppmi(*_neighbours([place_V[ids] for ids in documents], len(known)), len(known))
    size = min(size, len(known))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the sketch that the decomposition starts with
        left_SA, value_A, _ = torch.svd_lowrank(ppmi_SS, q=min(size + 16, len(known)), niter=4)
    vector_VA = torch.zeros(tokenizer.vocab_size, size)
    vector_VA[torch.from_numpy(known)] = left_SA[:, :size] * value_A[:size].sqrt()
    return Auxiliary(vector_VA, is_known_V)


def _neighbours(documents: Sequence[NDArray[np.int64]], size: int) -> tuple[NDArray[np.int64], Tensor]:
    """Return the pairs that occur, as a · size + b in order, and the weight of each; symmetric."""
    apart = np.full(WINDOW, -1, np.int64)  # no window reaches into the next document
    flat = np.concatenate([part for ids in documents for part in (ids, apart)])
    keys, weights = np.empty(0, np.int64), np.empty(0)
    for distance in range(1, WINDOW + 1):
        first, second = flat[:-distance], flat[distance:]
        both = (first >= 0) & (second >= 0)
        pair, count = np.unique(first[both] * size + second[both], return_counts=True)
        keys = np.concatenate([keys, pair, pair % size * size + pair // size])
        weights = np.concatenate([weights, np.tile(count * (WINDOW + 1 - distance) / WINDOW, 2)])
    keys, place = np.unique(keys, return_inverse=True)
    return keys, torch.from_numpy(np.bincount(place, weights, len(keys)))


def _ppmi(key: NDArray[np.int64], weight: Tensor, size: int) -> Tensor:
    first, second = torch.from_numpy(key // size), torch.from_numpy(key % size)
    count_S = torch.zeros(size, dtype=torch.float64).index_add(0, first, weight)
    smooth_S = count_S**SMOOTHING
    log_p_S = (smooth_S / smooth_S.sum()).log()
    value = (weight.log() - count_S[first].log() - log_p_S[second]).clamp(min=0).float()
    is_positive = value > 0
    index = torch.stack([first, second])[:, is_positive]
    return torch.sparse_coo_tensor(index, value[is_positive], (size, size), check_invariants=False).coalesce()
