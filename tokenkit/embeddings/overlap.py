"""Which tokens of a new vocabulary the old one does not have."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenkit.embeddings.matching import copied_ids
from tokenkit.tokenization.tokenizer import Tokenizer


def new_tokens(old: Tokenizer, new: Tokenizer) -> NDArray[np.bool_]:
    """Return bool [V]: true for the ids of `new` whose embedding is no copy of one of `old`.

    An ordinary token overlaps where `old` has one of the same bytes, a special token where `old` has one
    of the same role or string.
    """
    return np.array([not ids for ids in copied_ids(old, new).ids], np.bool_)
