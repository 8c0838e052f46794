"""Rows of a new vocabulary as weighted sums of old rows, and the matrices that they make.

    new_v = Σ_k weight_k · old[id_k]        over the old ids of row v; a plain mean where no weights are given

Every initialisation but the random one and the hypernetwork is such a sum, found once for all matrices. Fast
vocabulary transfer says which old ids a row has, the same for input and output embedding:

    special token     the old token of the same role (BOS, EOS, end of turn, ...), else of the same string
    same bytes        that old token
    otherwise         mean of the old tokens that the old tokenizer writes the bytes with; `tokens_to_add` too
    never written     mean of all old rows, as for padding rows; other special tokens too

Source: Gee et al., "Fast Vocabulary Transfer for Language Model Compression", EMNLP 2022 industry 41.

Dimensions: V new vocabulary, W old vocabulary, D hidden size, K old ids in all sums together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.written import ids_by_bytes

CHUNK_BYTES = 2**26
"""Float32 copies of rows are made this many bytes at a time: a whole matrix of them would double a model."""


LABELS = ("special", "same_bytes", "mean_of_pieces", "mean_of_all")
"""What a row can be made of; those that are copied come first."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """What the ids of one tokenizer index in a model."""

    embedding_WD: Tensor
    """Input embedding."""
    output_WD: Tensor | None
    """Head; None: tied, the input embedding is the head."""
    bias_W: Tensor | None
    """Bias of the head, where it has one."""
    table_WE: Tensor | None = None
    """Rows for every layer, side by side, where the model has such a table (Gemma 3n, Gemma 4)."""


@dataclass(frozen=True, slots=True)
class RowSources:
    """From which old rows each new row is made, and why."""

    old_ids_K: Tensor
    """int64, the old ids of all rows, one row after the other."""
    offset_V: Tensor
    """int64 [V], where each row begins in `old_ids_K`."""
    method_V: NDArray[np.uint8]
    """Index into `labels`."""
    labels: tuple[str, ...] = LABELS
    """What a row can be made of. Rows of "mean_of_all" are the mean of all old rows."""
    weight_K: Tensor | None = None
    """float32; None: each row is the mean of its old rows."""

    def report(self) -> dict[str, int]:
        """Return how many rows were made of what."""
        counts = np.bincount(self.method_V, minlength=len(self.labels))
        return {label: int(count) for label, count in zip(self.labels, counts, strict=True)}

    def rows(self, old_WD: Tensor, size: int) -> Tensor:
        """Return the new matrix, `size` rows of `old_WD`'s dtype; sums are float32 or better.

        Rows without a source, and padding rows from `len(offset_V)` on, are the mean of all old rows: as
        part of a head they then draw next to no probability, which zeros would not guarantee.
        """
        old_WD = old_WD.detach()
        new = old_WD.new_empty(size, old_WD.shape[1])
        count = len(self.offset_V)
        end_V = torch.cat([self.offset_V[1:], torch.tensor([len(self.old_ids_K)])])
        for start, stop in self._pieces(end_V, old_WD):
            part = slice(int(self.offset_V[start]), int(end_V[stop - 1]))
            new[start:stop] = self._sums(old_WD, part, self.offset_V[start:stop])
        without = torch.ones(size, dtype=torch.bool)
        if "mean_of_all" in self.labels:
            without[:count] = torch.from_numpy(self.method_V == self.labels.index("mean_of_all"))
        else:
            without[:count] = False
        new[without] = mean_row(old_WD).to(new.dtype)
        return new

    def part(self, start: int, stop: int) -> RowSources:
        """Return the sources of the rows from `start` to before `stop`."""
        first = int(self.offset_V[start])
        ids = slice(first, int(self.offset_V[stop]) if stop < len(self.offset_V) else len(self.old_ids_K))
        weight_K = None if self.weight_K is None else self.weight_K[ids]
        return RowSources(
            self.old_ids_K[ids],
            self.offset_V[start:stop] - first,
            self.method_V[start:stop],
            self.labels,
            weight_K,
        )

    def _pieces(self, end_V: Tensor, old_WD: Tensor) -> Iterator[tuple[int, int]]:
        """Cut the rows where their old ids together reach a chunk."""
        limit = max(1, CHUNK_BYTES // (4 * old_WD.shape[1]))
        start, count = 0, len(self.offset_V)
        while start < count:
            reach = int(self.offset_V[start]) + limit
            stop = int(torch.searchsorted(end_V, reach, right=True))
            stop = min(max(stop, start + 1), start + limit, count)
            yield start, stop
            start = stop

    def _sums(self, old_WD: Tensor, part: slice, offset: Tensor) -> Tensor:
        ids, place = torch.unique(self.old_ids_K[part], return_inverse=True)
        old = old_WD[ids]
        old = old.to(torch.promote_types(old.dtype, torch.float32))
        if self.weight_K is None:
            return torch.nn.functional.embedding_bag(place, old, offset - part.start, mode="mean")
        weight = self.weight_K[part].to(old.dtype)
        return torch.nn.functional.embedding_bag(
            place, old, offset - part.start, mode="sum", per_sample_weights=weight
        )


def from_lists(
    ids: Sequence[Sequence[int] | NDArray[np.int64]],
    method_V: NDArray[np.uint8],
    labels: tuple[str, ...] = LABELS,
    weights: Sequence[Sequence[float] | NDArray[np.float64]] | None = None,
) -> RowSources:
    """Return the sources of rows given as one list of old ids, and perhaps of weights, for each."""
    length_V = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.concatenate([np.asarray(row, np.int64) for row in ids])
    weight_K = None
    if weights is not None:
        weight_K = torch.from_numpy(np.concatenate([np.asarray(row, np.float32) for row in weights]))
    offset_V = np.cumsum(length_V) - length_V
    return RowSources(torch.from_numpy(flat), torch.from_numpy(offset_V), method_V, labels, weight_K)


def chunks(old_WD: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a matrix, a piece at a time, in float32 or better."""
    dtype = torch.promote_types(old_WD.dtype, torch.float32)
    step = max(1, CHUNK_BYTES // (4 * old_WD.shape[1]))
    for start in range(0, len(old_WD), step):
        yield old_WD[start : start + step].detach().to(dtype)


def mean_row(old_WD: Tensor) -> Tensor:
    """Return the mean of all rows, [D], float32 or better, without a float32 copy of the matrix."""
    total = sum((part.double().sum(0) for part in chunks(old_WD)), torch.zeros((), dtype=torch.float64))
    return (total / len(old_WD)).to(torch.promote_types(old_WD.dtype, torch.float32))


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
    to_make: list[int]
    """Ids whose rows have to be made: what is written in texts, and `tokens_to_add`. All others that are not
    copied are the mean of all: special tokens, and tokens that are never written."""
    by_bytes: dict[bytes, int]
    """The old token that is written for each byte string; see `ids_by_bytes`."""


def copied_ids(old: Tokenizer, new: Tokenizer, matching: Matching | None = None) -> Copied:
    """Return what is copied. A special token with two roles is the mean of two old ones."""
    matching = Matching() if matching is None else matching
    ids: list[Sequence[int]] = [()] * new.vocab_size
    label_V = np.full(new.vocab_size, LABELS.index("mean_of_all"), np.uint8)
    written, by_bytes = ids_by_bytes(new), ids_by_bytes(old)
    for token_id, pair in special_pairs(old, new).items():
        is_end = token_id in (new.bos_id, new.eos_id)
        if matching.bos_eos if is_end else matching.special:
            ids[token_id], label_V[token_id] = pair, LABELS.index("special")
    if matching.same_bytes:
        for token_id, found in same_bytes(old, new, written, by_bytes).items():
            ids[token_id], label_V[token_id] = (found,), LABELS.index("same_bytes")
    added = [new.control[string] for string in new.tokens_to_add] if matching.special else []
    to_make = sorted({i for i in (*written.values(), *added) if not ids[i]})
    return Copied(ids, label_V, to_make, by_bytes)


def same_bytes(
    old: Tokenizer, new: Tokenizer, written: Mapping[bytes, int], by_bytes: Mapping[bytes, int]
) -> dict[int, int]:
    """Return {new id: old id} of ordinary tokens with the same bytes; `ids_by_bytes` of both are given.

    Where a vocabulary spells the same bytes twice (a character and its byte piece), what is written takes the
    row of what was written. What is never written takes that of what never was, or none: in a head it would
    otherwise take half of the other's probability.
    """
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
    written = write_with(old, [new.token_bytes[i] for i in copied.to_make], copied.by_bytes)
    for token_id, ids in zip(copied.to_make, written, strict=True):
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


def new_tokens(old: Tokenizer, new: Tokenizer) -> NDArray[np.bool_]:
    """Return bool [V]: true for the ids of `new` whose embedding is no copy of one of `old`.

    An ordinary token overlaps where `old` has one of the same bytes, a special token where `old` has one
    of the same role or string.
    """
    return np.array([not ids for ids in copied_ids(old, new).ids], np.bool_)
