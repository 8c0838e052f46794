"""Bits that models need for each byte of a text, whatever their tokenizers.

A token's bits are shared out equally over its bytes, so every byte has a figure under every model; sums over
the same bytes can be compared. A byte counts where all models score it: not where a model without BOS has
nothing before it, nor where a tokenizer writes an unknown token.

Long text is read in windows: each begins `stride` tokens behind the last, and scores the tokens that no
window before it has scored, so that these have at least window - stride tokens before them.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenkit.losses.fused import linear_cross_entropy
from tokenkit.structs import NO_LABEL

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM
    from tokenkit.tokenization.tokenizer import Tokenizer

Floats = NDArray[np.float64]
CLASSES = ("letters", "digits", "whitespace", "punctuation", "other scripts")
"""Of bytes, by their character: Latin letters, numbers, spaces, punctuation and symbols, all others."""


def classes_of(text: str) -> NDArray[np.int8]:
    """Return the class of each byte of a text, an index into CLASSES."""
    known = {letter: (_class_of(letter), len(letter.encode())) for letter in set(text)}
    pairs = [known[letter] for letter in text]
    kinds, lengths = np.array([p[0] for p in pairs], np.int8), np.array([p[1] for p in pairs], np.int64)
    return np.repeat(kinds, lengths)


def _class_of(letter: str) -> int:
    kind = unicodedata.category(letter)
    if letter.isspace():
        return 2
    if kind[0] == "N":
        return 1
    if kind[0] in "PS":
        return 3
    is_latin = kind[0] == "L" and (letter.isascii() or unicodedata.name(letter, "").startswith("LATIN"))
    return 0 if is_latin else 4


@torch.no_grad()
def bits_of_bytes(
    model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], *, window: int, stride: int
) -> tuple[list[Floats], int]:
    """Return the bits of each byte of each text, NaN where the model scores none, and the number of tokens.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        texts: canonical for the tokenizer.
        window: tokens that are read at once.
        stride: from 1 to window - 1.
    """
    found, count = [], 0
    for text, tokens in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        lead = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids_T = torch.tensor(lead + tokens.ids.tolist())
        bits_T = np.full(len(ids_T), np.nan)
        for start, first, end in _windows(len(ids_T), window, stride):
            states = model(ids_T[None, start:end])
            targets_T = ids_T[start:end].clone()
            targets_T[: first - start] = NO_LABEL
            nats_T = linear_cross_entropy(
                states.hidden_BTD, states.head, targets_T[None], shift=True, reduction="none"
            )[0]
            bits_T[first:end] = nats_T.double().numpy()[first - start - 1 : end - start - 1] / math.log(2)
        bits = bits_T[len(lead) :]
        if tokenizer.unk_id is not None:
            bits[tokens.ids == tokenizer.unk_id] = np.nan
        found.append(_spread(bits, np.asarray(tokens.byte_ends), len(text.encode())))
        count += len(tokens.ids)
    return found, count


def _windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield where a window begins, the first token that it scores, and where it ends."""
    start, scored = 0, 1
    while scored < length:
        end = min(start + window, length)
        yield start, scored, end
        scored, start = end, start + stride


def _spread(bits_T: Floats, ends_T: NDArray[np.int64], num_bytes: int) -> Floats:
    """Share each token's bits over its bytes; a token of no width adds its own to the next one's."""
    result, begin, carried = np.full(num_bytes, np.nan), 0, 0.0
    for bits, end in zip(bits_T, ends_T, strict=True):
        if end == begin:
            carried += bits
            continue
        result[begin:end] = (bits + carried) / (end - begin)
        begin, carried = int(end), 0.0
    return result


def summary(
    texts: Sequence[str], bits: dict[str, list[Floats]], tokens: dict[str, int], *, samples: int, seed: int
) -> dict[str, Any]:
    """Return bits per byte by model, over all and by class, and intervals of the differences to the first.

    Args:
        texts: the documents.
        bits: by model, of each byte of each document.
        tokens: by model.
        samples: of the bootstrap, which draws documents with replacement, the same for both models.
        seed: of the draws.

    Raises:
        ValueError: no byte is scored by all models.
    """
    counted = [np.isfinite(np.stack(parts)).all(0) for parts in zip(*bits.values(), strict=True)]
    sizes = np.array([mask.sum() for mask in counted], np.float64)
    if not sizes.sum():
        raise ValueError("no byte of the text is scored by all models: give longer documents")
    kinds = np.concatenate([classes_of(t)[m] for t, m in zip(texts, counted, strict=True)])
    all_bytes = sum(len(text.encode()) for text in texts)
    result: dict[str, dict[str, Any]] = {}
    sums: dict[str, Floats] = {}
    for name, documents in bits.items():
        kept = [values[mask] for values, mask in zip(documents, counted, strict=True)]
        flat, sums[name] = np.concatenate(kept), np.array([values.sum() for values in kept])
        by_class = {c: float(flat[kinds == i].mean()) for i, c in enumerate(CLASSES) if (kinds == i).any()}
        result[name] = {
            "bits_per_byte": float(flat.mean()),
            "bits_per_byte_by_class": by_class,
            "bytes_per_token": all_bytes / tokens[name],
        }
    first, *others = bits
    shares = {c: float((kinds == i).mean()) for i, c in enumerate(CLASSES) if (kinds == i).any()}
    drawn = np.random.default_rng(seed).integers(len(texts), size=(samples, len(texts)))
    differences = {
        name: {"difference": result[name]["bits_per_byte"] - result[first]["bits_per_byte"]}
        | _interval((sums[name] - sums[first]), sizes, drawn)
        for name in others
    }
    return {
        "documents": len(texts), "bytes": int(sizes.sum()), "share_of_bytes_by_class": shares,
        "models": result, "against": first, "differences": differences,
    }  # fmt: skip


def _interval(bits: Floats, sizes: Floats, drawn: NDArray[np.int64]) -> dict[str, Any]:
    if len(sizes) < 2:
        return {"interval_95": None}
    totals = sizes[drawn].sum(1)
    values = (bits[drawn].sum(1)[totals > 0]) / totals[totals > 0]
    return {"interval_95": [float(edge) for edge in np.percentile(values, [2.5, 97.5])]}


def table(found: dict[str, Any]) -> str:
    """Return the figures as text, one line for each model."""
    kinds = list(found["share_of_bytes_by_class"])
    width = max(len("share of the bytes"), *map(len, found["models"]))
    lines = [f"{'model':<{width}}  bits/byte  bytes/token  " + "  ".join(f"{kind:>13}" for kind in kinds)]
    for name, one in found["models"].items():
        by_class = "  ".join(f"{one['bits_per_byte_by_class'][kind]:13.4f}" for kind in kinds)
        head = f"{one['bits_per_byte']:9.4f}  {one['bytes_per_token']:11.2f}"
        lines.append(f"{name:<{width}}  {head}  {by_class}")
    shares = "  ".join(f"{share:13.1%}" for share in found["share_of_bytes_by_class"].values())
    lines.append(f"{'share of the bytes':<{width}}  {'':9}  {'':11}  {shares}")
    lines.append(f"over {found['bytes']:,} bytes of {found['documents']:,} documents that all models score")
    for name, one in found["differences"].items():
        edges = one["interval_95"]
        words = (
            "one document gives no interval" if edges is None else f"95 %: {edges[0]:+.4f} to {edges[1]:+.4f}"
        )
        lines.append(f"{name} - {found['against']}: {one['difference']:+.4f} bits/byte ({words})")
    return "\n".join(lines)
