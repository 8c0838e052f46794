"""Bits that models need for each byte of a text, whatever their tokenizers.

`byte_shares` says what the bits of a byte are; sums over the same bytes can be compared. A byte counts
where all models score it.

Long text is read in windows: each begins `stride` tokens behind the last, and scores the tokens that no
window before it has scored, so that these have at least window - stride tokens before them. Windows of one
length are read together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenkit.evaluation.byte_shares import Floats, place, predicted
from tokenkit.evaluation.scripts import FIRST, classes_of
from tokenkit.kernels.deferred import raise_found
from tokenkit.losses.score import token_nats
from tokenkit.structs import HiddenStates, Side
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.chat.encode import encode_flat
from tokenkit.tokenization.ragged import Bools, FlatTokens
from tokenkit.tokenization.tokenizer import Tokenizer

States = Callable[[Tensor], HiddenStates]
"""From int64 ids [B, T], padded on the right, to hidden states and head: a `CausalLM`."""
Nats = Callable[[Side], Tensor]
"""From a batch to [B, T] −log p of each token that its loss mask keeps."""


def nats_of(model: States) -> Nats:
    """Return what one model needs for the tokens of a batch."""
    return lambda side: token_nats(model(side.ids_BT), side)


@torch.no_grad()
def bits_of_bytes(
    nats: Nats, tokenizer: Tokenizer, texts: Sequence[str], *, window: int, stride: int, batch: int = 8
) -> tuple[list[Floats], int]:
    """Return the bits of each byte of each text, NaN where the model scores none, and the number of tokens.

    Args:
        nats: of a model in evaluation mode, `nats_of`, or of several.
        tokenizer: the model's.
        texts: not empty, and canonical for the tokenizer.
        window: tokens that are read at once.
        stride: from 1 to window - 1.
        batch: windows in one forward.
    """
    documents = [Document(text=text) for text in texts]
    (side,) = encode_flat(documents, (tokenizer,), mode="direct_encode")
    wanted_N = predicted(side, tokenizer)
    bits_N = _in_place(nats, side, wanted_N, _windows_of(side, window, stride), batch) / math.log(2)
    raise_found()  # what a GPU noted of numbers that are not finite
    (placed,), start_B = place((side,), (tokenizer,))
    bits_A = placed.spread(bits_N, int(start_B[-1]))
    last_B = start_B[:-1] + [
        int(ends[~special].max()) for ends, special in zip(*_by_document(side), strict=True)
    ]
    sizes = [len(text.encode()) for text in texts]
    found = [bits_A[end - size : end] for end, size in zip(last_B, sizes, strict=True)]
    return found, int((~side.special_N).sum())


def _by_document(side: FlatTokens) -> tuple[list[NDArray[np.int64]], list[Bools]]:
    borders = side.offset_B[1:-1]
    return np.split(side.byte_ends_N, borders), np.split(side.special_N, borders)


def _windows_of(side: FlatTokens, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Return where each window begins, the first token that it scores, and where it ends; shortest first."""
    found = [
        (offset + start, offset + first, offset + end)
        for offset, length in zip(side.offset_B.tolist(), side.length_B.tolist(), strict=False)
        for start, first, end in windows(length, window, stride)
    ]
    return sorted(found, key=lambda one: one[2] - one[0])


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield where a window begins, the first token that it scores, and where it ends."""
    start, scored = 0, 1
    while scored < length:
        end = min(start + window, length)
        yield start, scored, end
        scored, start = end, start + stride


def _in_place(
    nats: Nats,
    side: FlatTokens,
    wanted_N: Bools,
    spans: Sequence[tuple[int, int, int]],
    batch: int,
) -> Floats:
    """Return [N] −log p of the tokens that are wanted, NaN elsewhere."""
    nats_N = np.full(len(side.ids_N), np.nan)
    for at in range(0, len(spans), batch):
        rows = spans[at : at + batch]
        lengths = [end - start for start, _, end in rows]
        ids_BT = np.zeros((len(rows), max(lengths)), np.int64)
        trained_BT = np.zeros(ids_BT.shape, np.bool_)
        for row, (start, first, end) in enumerate(rows):
            ids_BT[row, : end - start] = side.ids_N[start:end]
            trained_BT[row, first - start : end - start] = wanted_N[first:end]
        padded = Side(torch.from_numpy(ids_BT), torch.tensor(lengths), torch.from_numpy(trained_BT))
        found_BT = nats(padded).double().cpu().numpy()
        for row, (start, first, end) in enumerate(rows):
            kept_T = trained_BT[row, first - start : end - start]
            nats_N[first:end][kept_T] = found_BT[row, first - start : end - start][kept_T]
    return nats_N


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
    names, kind_A = classes_of("".join(texts))
    kind_A = kind_A[np.concatenate(counted)]
    count = np.bincount(kind_A, minlength=len(names))
    order = [names.index(name) for name in FIRST if name in names]
    order += sorted(set(range(len(names))) - set(order), key=lambda kind: -count[kind])
    order = [kind for kind in order if count[kind]]
    all_bytes = sum(len(text.encode()) for text in texts)
    result: dict[str, dict[str, Any]] = {}
    sums: dict[str, Floats] = {}
    for name, documents in bits.items():
        kept = [values[mask] for values, mask in zip(documents, counted, strict=True)]
        flat, sums[name] = np.concatenate(kept), np.array([values.sum() for values in kept])
        sum_of = np.bincount(kind_A, flat, len(names))
        result[name] = {
            "bits_per_byte": float(flat.mean()),
            "bits_per_byte_by_class": {names[k]: float(sum_of[k] / count[k]) for k in order},
            "bytes_per_token": all_bytes / tokens[name],
        }
    first, *others = bits
    drawn = np.random.default_rng(seed).integers(len(texts), size=(samples, len(texts)))
    differences = {
        name: {"difference": result[name]["bits_per_byte"] - result[first]["bits_per_byte"]}
        | _interval((sums[name] - sums[first]), sizes, drawn)
        for name in others
    }
    return {
        "documents": len(texts), "bytes": int(sizes.sum()),
        "share_of_bytes_by_class": {names[k]: float(count[k] / count.sum()) for k in order},
        "models": result, "against": first, "differences": differences,
    }  # fmt: skip


def _interval(bits: Floats, sizes: Floats, drawn: NDArray[np.int64]) -> dict[str, Any]:
    if len(sizes) < 2:
        return {"interval_95": None}
    totals = sizes[drawn].sum(1)
    values = (bits[drawn].sum(1)[totals > 0]) / totals[totals > 0]
    return {"interval_95": [float(edge) for edge in np.percentile(values, [2.5, 97.5])]}


def table(found: dict[str, Any]) -> str:
    """Return the figures as text: one line for each model, then one for each class of bytes."""
    models, shares = found["models"], found["share_of_bytes_by_class"]
    width = max(len("bits/byte of class"), *map(len, [*models, *shares]))
    lines = [f"{'model':<{width}}  bits/byte  bytes/token"]
    for name, one in models.items():
        lines.append(f"{name:<{width}}  {one['bits_per_byte']:9.4f}  {one['bytes_per_token']:11.2f}")
    heads = [name.rstrip("/").rpartition("/")[2] for name in models]
    if len(set(heads)) < len(heads):  # folders of one name
        heads = [name.rstrip("/")[-16:] for name in models]
    lines += ["", f"{'bits/byte of class':<{width}}  {'bytes':>7}  " + "  ".join(f"{h:>9}" for h in heads)]
    for kind, share in shares.items():
        figures = (
            f"{one['bits_per_byte_by_class'][kind]:{max(9, len(head))}.4f}"
            for head, one in zip(heads, models.values(), strict=True)
        )
        lines.append(f"{kind:<{width}}  {share:7.1%}  " + "  ".join(figures))
    lines.append(f"over {found['bytes']:,} bytes of {found['documents']:,} documents that all models score")
    for name, one in found["differences"].items():
        edges = one["interval_95"]
        words = (
            "one document gives no interval" if edges is None else f"95 %: {edges[0]:+.4f} to {edges[1]:+.4f}"
        )
        lines.append(f"{name} - {found['against']}: {one['difference']:+.4f} bits/byte ({words})")
    return "\n".join(lines)
