"""Which tokens of a new vocabulary take a row of the old one as it is: special tokens by role, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenkit.embeddings.rows import LABELS
from tokenkit.tokenization.written import ids_by_bytes

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which rows are copied. A special token that is not is the mean of all rows."""

    same_bytes: bool = True
    """Ordinary tokens with the bytes of an old one."""
    special: bool = True
    """Special tokens but BOS and EOS: by role, else by their string."""
    bos_eos: bool = True
    """BOS and EOS, by role."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The old ids whose mean each new row is; none where it has to be made otherwise."""

    ids: list[Sequence[int]]
    label_V: NDArray[np.uint8]
    """Index into LABELS; "mean_of_all" where nothing is copied."""


def copied_ids(old: Tokenizer, new: Tokenizer, matching: Matching | None = None) -> Copied:
    """Return what is copied. A special token with two roles is the mean of two old ones."""
    matching = Matching() if matching is None else matching
    ids: list[Sequence[int]] = [()] * new.vocab_size
    label_V = np.full(new.vocab_size, LABELS.index("mean_of_all"), np.uint8)
    for token_id, pair in special_pairs(old, new).items():
        is_end = token_id in (new.bos_id, new.eos_id)
        if matching.bos_eos if is_end else matching.special:
            ids[token_id], label_V[token_id] = pair, LABELS.index("special")
    if matching.same_bytes:
        for token_id, found in same_bytes(old, new).items():
            ids[token_id], label_V[token_id] = (found,), LABELS.index("same_bytes")
    return Copied(ids, label_V)


def same_bytes(old: Tokenizer, new: Tokenizer) -> dict[int, int]:
    """Return {new id: old id} of ordinary tokens with the same bytes.

    Where a vocabulary spells the same bytes twice (a character and its byte piece), what is written takes the
    row of what was written. What is never written takes that of what never was, or none: in a head it would
    otherwise take half of the other's probability.
    """
    written, by_bytes = ids_by_bytes(new), ids_by_bytes(old)
    spare: dict[bytes, list[int]] = {}
    for token_id in ordinary_ids(old):
        if by_bytes[raw := old.token_bytes[token_id]] != token_id:
            spare.setdefault(raw, []).append(token_id)
    result = {}
    for token_id in ordinary_ids(new):
        raw = new.token_bytes[token_id]
        if written[raw] == token_id:
            found = by_bytes.get(raw)
        else:
            found = spare[raw].pop(0) if spare.get(raw) else None
        if found is not None:
            result[token_id] = found
    return result


def to_make(new: Tokenizer, copied: Copied, matching: Matching | None = None) -> list[int]:
    """Return the ids whose rows have to be made: what is written in texts, and `tokens_to_add`.

    All other rows that are not copied are the mean of all: special tokens, and tokens that are never written.
    """
    added = [new.control[string] for string in new.tokens_to_add]
    if matching is not None and not matching.special:
        added = []
    return sorted({i for i in (*ids_by_bytes(new).values(), *added) if not copied.ids[i]})


def special_pairs(old: Tokenizer, new: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Return {new id: old ids} of special tokens: the same roles, else the same string.

    A token with two roles (GPT-2 writes one token at both ends) is made of the old tokens of both. A pad
    token has nothing to carry over, so that role counts only where it is a token's only one.
    """
    by_string = {
        old.token_bytes[i]: i for i in np.flatnonzero(old.is_special_V).tolist() if old.token_bytes[i]
    }
    roles: dict[int, list[str]] = {}
    for role, token_id in new.special_ids.items():
        if role in old.special_ids:
            roles.setdefault(token_id, []).append(role)
    pairs: dict[int, tuple[int, ...]] = {}
    for token_id in np.flatnonzero(new.is_special_V).tolist():
        named = roles.get(token_id, [])
        named = [role for role in named if role != "pad"] or named
        if named:
            pairs[token_id] = tuple(sorted({old.special_ids[role] for role in named}))
        elif new.token_bytes[token_id] in by_string:
            pairs[token_id] = (by_string[new.token_bytes[token_id]],)
    return pairs


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of tokens that stand for text."""
    return np.flatnonzero(~tokenizer.is_special_V & (tokenizer.byte_length_V > 0)).tolist()


def need_something(old: Tokenizer, new: Tokenizer) -> None:
    """Refuse a pair that no token connects.

    Raises:
        ValueError: no byte of an ordinary token of one occurs in those of the other.
    """
    seen = [set(b"".join(t.token_bytes[i] for i in ordinary_ids(t))) for t in (old, new)]
    if not seen[0] & seen[1]:
        raise ValueError(
            f"no token of {new} can be made from tokens of {old}: they share no byte; check that both "
            "tokenizer specs name what they are meant to"
        )
