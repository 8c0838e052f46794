"""Which of the tokens with the same bytes a tokenizer writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer


def ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the ordinary token of each byte string.

    Where several tokens have the same bytes (a character of Gemma and its byte piece) it is the one that
    the tokenizer writes: the others were never trained.
    """
    result: dict[bytes, int] = {}
    repeated: dict[bytes, str] = {}
    for token_id in np.flatnonzero(~tokenizer.is_special_V & (tokenizer.byte_length_V > 0)).tolist():
        raw = tokenizer.token_bytes[token_id]
        if raw in result:
            repeated[raw] = raw.decode("utf-8", errors="ignore")
        result[raw] = token_id
    encoded = tokenizer.try_encode_batch(list(repeated.values()), before="text")
    for raw, tokens in zip(repeated, encoded, strict=True):
        if tokens is not None and len(tokens.ids) == 1 and tokenizer.token_bytes[tokens.ids[0]] == raw:
            result[raw] = int(tokens.ids[0])
    return result
