"""Fast vocabulary transfer: every row of the new vocabulary as a mean of rows of the old one.

    special token     the old token of the same role (BOS, EOS, end of turn, ...)
    same bytes        that old token
    otherwise         mean of the old tokens that the old tokenizer writes the bytes with
    nothing to write  mean of all old rows, as for padding rows

Input and output embedding are made separately, from the same old ids.

Source: Gee et al., "Fast Vocabulary Transfer for Language Model Compression", EMNLP 2022 industry 41.
Dimensions: V new vocabulary, W old vocabulary, D hidden size, K old ids in all means together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenkit.models.causal_lm import CausalLM, effective_weight, head_bias
from tokenkit.tokenization.byteify import Tokenizer

METHODS = ("special", "same_bytes", "mean_of_pieces", "mean_of_all")
OutputEmbeddings = Literal["preserve", "untie"]


@dataclass(frozen=True, slots=True)
class RowSources:
    """From which old rows each new row is made, and why."""

    old_ids_K: Tensor
    """int64, the old ids of all rows, one row after the other."""
    offset_V: Tensor
    """int64 [V], where each row begins in `old_ids_K`."""
    method_V: NDArray[np.uint8]
    """Index into METHODS."""

    def report(self) -> dict[str, int]:
        """Return how many rows each method made."""
        counts = np.bincount(self.method_V, minlength=len(METHODS))
        return {method: int(count) for method, count in zip(METHODS, counts, strict=True)}

    def rows(self, old_WD: Tensor, size: int) -> Tensor:
        """Return the new matrix, `size` rows of `old_WD`'s dtype; sums are float32 or better.

        Rows without a source, and padding rows from `len(offset_V)` on, are the mean of all old rows: as
        part of a head they then draw next to no probability, which zeros would not guarantee.
        """
        dtype = torch.promote_types(old_WD.dtype, torch.float32)
        old = old_WD.detach().to(dtype)
        new = torch.empty(size, old.shape[1], dtype=dtype)
        count = len(self.offset_V)
        new[:count] = torch.nn.functional.embedding_bag(self.old_ids_K, old, self.offset_V, mode="mean")
        without = torch.ones(size, dtype=torch.bool)
        without[:count] = torch.from_numpy(self.method_V == METHODS.index("mean_of_all"))
        new[without] = old.mean(0)
        return new.to(old_WD.dtype)


def row_sources(old: Tokenizer, new: Tokenizer) -> RowSources:
    """Say from which rows of `old` each row of `new` is made. Deterministic.

    Raises:
        ValueError: the two vocabularies have no token in common and nothing to build one from.
    """
    by_bytes = ids_by_bytes(old)
    roles = special_pairs(old, new)
    pieces: list[Sequence[int]] = [()] * new.vocab_size
    method_V = np.full(new.vocab_size, METHODS.index("mean_of_all"), np.uint8)
    to_write: list[int] = []
    for token_id, raw in enumerate(new.token_bytes):
        if token_id in roles:
            pieces[token_id], method_V[token_id] = roles[token_id], METHODS.index("special")
        elif new.is_special_V[token_id] or not raw:
            continue
        elif raw in by_bytes:
            pieces[token_id], method_V[token_id] = (by_bytes[raw],), METHODS.index("same_bytes")
        else:
            to_write.append(token_id)
    written = write_with(old, [new.token_bytes[i] for i in to_write], by_bytes)
    for token_id, ids in zip(to_write, written, strict=True):
        if ids:
            pieces[token_id], method_V[token_id] = ids, METHODS.index("mean_of_pieces")
    if not any(pieces):
        raise ValueError(
            f"no token of {new} can be made from tokens of {old}: they share no byte; check that both "
            "tokenizer specs name what they are meant to"
        )
    length_V = np.fromiter(map(len, pieces), np.int64, len(pieces))
    flat = np.fromiter((i for ids in pieces for i in ids), np.int64, int(length_V.sum()))
    offset_V = np.cumsum(length_V) - length_V
    return RowSources(torch.from_numpy(flat), torch.from_numpy(offset_V), method_V)


def ids_by_bytes(old: Tokenizer) -> dict[bytes, int]:
    """Return the ordinary token of each byte string.

    Where several tokens have the same bytes (a character of Gemma and its byte piece) it is the one that
    the tokenizer writes: the others were never trained.
    """
    result: dict[bytes, int] = {}
    repeated: dict[bytes, str] = {}
    for token_id in np.flatnonzero(~old.is_special_V & (old.byte_length_V > 0)).tolist():
        raw = old.token_bytes[token_id]
        if raw in result:
            repeated[raw] = raw.decode("utf-8", errors="ignore")
        result[raw] = token_id
    encoded = old.try_encode_batch(list(repeated.values()), before="text")
    for raw, tokens in zip(repeated, encoded, strict=True):
        if tokens is not None and len(tokens.ids) == 1 and old.token_bytes[tokens.ids[0]] == raw:
            result[raw] = int(tokens.ids[0])
    return result


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


def transfer_vocabulary(
    model: CausalLM,
    old: Tokenizer,
    new: Tokenizer,
    *,
    pad_to_multiple_of: int = 1,
    output_embeddings: OutputEmbeddings = "preserve",
) -> dict[str, int]:
    """Give `model`, whose tokenizer is `old`, rows for `new`, in place; return how many each method made.

    Args:
        model: its embedding, its head and, where it has one, the bias of its head are replaced.
        old: the tokenizer that the model was trained with.
        new: the tokenizer that it gets.
        pad_to_multiple_of: the number of rows is rounded up to this; the rows beyond are padding.
        output_embeddings: "preserve" keeps a tied head tied; "untie" gives it rows of its own.

    Raises:
        ValueError: `old` has more ids than the model has rows, or shares nothing with `new`.
    """
    input_WD = effective_weight(model.embedding)
    if old.vocab_size > input_WD.shape[0]:
        raise ValueError(
            f"tokenizer {old.spec} has {old.vocab_size} ids but the model's embedding only "
            f"{input_WD.shape[0]} rows: name the tokenizer that the model was trained with"
        )
    sources = row_sources(old, new)
    size = -(-new.vocab_size // pad_to_multiple_of) * pad_to_multiple_of
    output_WD, bias_W = effective_weight(model.output), head_bias(model.output)
    is_tied = model.is_tied and output_embeddings == "preserve"
    model.replace_vocabulary(
        embedding_VD=sources.rows(input_WD[: old.vocab_size], size),
        output_VD=None if is_tied else sources.rows(output_WD[: old.vocab_size], size),
        bias_V=None if bias_W is None else sources.rows(bias_W[: old.vocab_size, None], size)[:, 0],
        vocab_size=new.vocab_size,
    )
    return sources.report()
