"""Whole documents in fewer, fuller rows, the same on both sides, for the models alone.

A batch keeps a row for each document, and so do the losses. What the bodies read is laid out anew: each
document goes to the same row on both sides, whose tokens have positions from 0 on, so a model that reads
positions (`models.check.check_packing`) keeps documents apart. Hidden states come back to the documents' own
rows by `Packed.place_BT`: nothing but rounding tells a loss how the documents lay, and no chunk crosses two.

Rows are filled evenly, the largest document first (Graham 1969, "Bounds on multiprocessing timing
anomalies"): a row is as long as the fullest, so what is uneven is padding. There are as many rows as
documents of the longest length would need, or fewer and longer ones, until little is padding.

Dimensions: B documents, T positions of one side, R rows, P positions of a row, K = 2 sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenkit.structs import Packed

Ints = NDArray[np.int64]


PADDING = 0.05
"""Of all positions of a side: what may stay padding while there is more than one row."""
_TRIES = 16


def lay_out(length_BK: Ints, most_K: Sequence[int]) -> tuple[Ints, Ints]:
    """Return the row of each document, [B], and the token there at which it begins on each side, [B, K].

    Args:
        length_BK: tokens of each document on each side.
        most_K: tokens of the longest document on each side: about as long is a row, or longer.
    """
    num_rows = max(1, int(np.ceil((length_BK / np.array(most_K)).sum(0).max() - 1e-9)))
    step = max(1, num_rows // _TRIES)
    for rows in [*range(num_rows, 1, -step), 1]:
        row_B, start_BK, used_RK = _filled(length_BK, np.array(most_K), rows)
        if (1 - used_RK.mean(0) / used_RK.max(0).clip(1)).max() <= PADDING:
            break  # of one row nothing is padding
    return row_B, start_BK


def _filled(length_BK: Ints, most_K: Ints, num_rows: int) -> tuple[Ints, Ints, Ints]:
    """Put each document into the emptiest row; return also what rows hold, [R, K]."""
    row_B, start_BK = np.zeros(len(length_BK), np.int64), np.zeros_like(length_BK)
    used_RK = np.zeros((num_rows, len(most_K)), np.int64)
    for b in np.argsort(-(length_BK / most_K).max(1), kind="stable").tolist():
        row = int(((used_RK + length_BK[b]) / most_K).max(1).argmin())
        row_B[b], start_BK[b] = row, used_RK[row]
        used_RK[row] += length_BK[b]
    return row_B, start_BK, used_RK


def packed_rows(
    ids_N: NDArray[Any], length_B: Ints, T: int, row_B: Ints, start_B: Ints, pad_id: int
) -> Packed:
    """Lay one side out.

    Args:
        ids_N: tokens of all documents, one behind the other.
        length_B: tokens of each.
        T: positions of a document's own row.
        row_B: what `lay_out` returned.
        start_B: the same, of this side.
        pad_id: fills rows up.
    """
    num_rows = int(row_B.max(initial=0)) + 1
    used_R = np.bincount(row_B, length_B, num_rows).astype(np.int64)
    P = max(1, int(used_R.max()))
    within_N = np.arange(len(ids_N)) - np.repeat(np.cumsum(length_B) - length_B, length_B)
    place_N = np.repeat(row_B * P + start_B, length_B) + within_N
    ids_RP = np.full(num_rows * P, pad_id, np.int64)
    ids_RP[place_N] = ids_N
    position_RP = np.arange(P) - used_R[:, None]  # of the padding: a document of its own
    position_RP.reshape(-1)[place_N] = within_N
    place_BT = np.zeros((len(length_B), T), np.int64)
    place_BT[np.arange(T) < length_B[:, None]] = place_N
    ids, position = torch.from_numpy(ids_RP.reshape(num_rows, P)), torch.from_numpy(position_RP)
    return Packed(ids, position, torch.from_numpy(place_BT))
