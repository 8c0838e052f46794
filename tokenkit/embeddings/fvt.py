"""Fast vocabulary transfer: every row of the new vocabulary as a mean of rows of the old one.

    special token     the old token of the same role (BOS, EOS, end of turn, ...), else of the same string
    same bytes        that old token
    otherwise         mean of the old tokens that the old tokenizer writes the bytes with; `tokens_to_add` too
    never written     mean of all old rows, as for padding rows; other special tokens too

Input and output embedding are made separately, from the same old ids.

Source: Gee et al., "Fast Vocabulary Transfer for Language Model Compression", EMNLP 2022 industry 41.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenkit.embeddings.matching import Matching, copied_ids, need_something, to_make
from tokenkit.embeddings.rows import LABELS, RowSources, from_lists
from tokenkit.tokenization.written import ids_by_bytes

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer


def row_sources(old: Tokenizer, new: Tokenizer, matching: Matching | None = None) -> RowSources:
    """Say from which rows of `old` each row of `new` is made. Deterministic.

    Raises:
        ValueError: the two vocabularies share no byte.
    """
    need_something(old, new)
    copied = copied_ids(old, new, matching)
    pieces, label_V = copied.ids, copied.label_V
    to_write = to_make(new, copied, matching)
    written = write_with(old, [new.token_bytes[i] for i in to_write], ids_by_bytes(old))
    for token_id, ids in zip(to_write, written, strict=True):
        if ids:
            pieces[token_id], label_V[token_id] = ids, LABELS.index("mean_of_pieces")
    return from_lists(pieces, label_V)


def write_with(old: Tokenizer, strings: Sequence[bytes], by_bytes: dict[bytes, int]) -> list[list[int]]:
    """Return the old ids that spell each byte string, as the old tokenizer writes it inside a text.

    Strings that are no UTF-8, or that the old tokenizer changes or cannot write whole, are spelled by
    the longest old token first; bytes that no old token has are left out.
    """
    result: list[list[int]] = [[] for _ in strings]
    texts: list[tuple[int, str]] = []
    for index, raw in enumerate(strings):
        try:
            texts.append((index, raw.decode("utf-8")))
        except UnicodeDecodeError:
            result[index] = _longest_first(raw, by_bytes)
    encoded = old.try_encode_batch([text for _, text in texts], before="text")
    for (index, _), tokens in zip(texts, encoded, strict=True):
        ids = None if tokens is None else tokens.ids
        if ids is None or (old.unk_id is not None and bool((ids == old.unk_id).any())):
            result[index] = _longest_first(strings[index], by_bytes)
        else:
            result[index] = ids.tolist()
    return result


def _longest_first(raw: bytes, by_bytes: dict[bytes, int]) -> list[int]:
    ids: list[int] = []
    position = 0
    while position < len(raw):
        for end in range(len(raw), position, -1):
            if (found := by_bytes.get(raw[position:end])) is not None:
                ids.append(found)
                position = end
                break
        else:
            position += 1
    return ids
