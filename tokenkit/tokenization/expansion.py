"""Input-id expansion: at every byte, the longest old token that ends there.

    text          t  h  e     c  a  t
    old token     t  th the ␣ ␣c ␣ca ␣cat     (of an old vocabulary that has them all)

    expanded_t = argmax of |w| over old tokens w with w = bytes of ids[t - |w| + 1 .. t]

A token lies within consecutive byte ids. Whatever is no byte (a special token, a template piece, padding)
has no expansion itself, and no token reaches across it. Only ordinary old tokens count.

The tables are a trie of the reversed tokens, breadth first: node 0 is the root, edge `e` leads to node
`e + 1`, and `edge_key` (node * 256 + byte) rises, so that one binary search follows an edge.

Source: input-id expansion of the byte students in Minixhofer et al. 2025, arXiv:2503.20083.
Dimensions: E edges of the trie, K positions of a batch that are still walked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NONE = -1
"""No old token ends here."""
BYTES = 256
"""Ids below this are the bytes themselves."""


@dataclass(frozen=True, slots=True)
class ExpansionTables:
    """A trie of reversed tokens as two flat arrays."""

    edge_key_E: NDArray[np.int64]
    """Strictly rising: node * 256 + byte of each edge."""
    token_E: NDArray[np.int64]
    """The old id that is spelled, read backwards, on the way to the node of each edge, or NONE."""
    max_bytes: int
    """The longest token; what stands further back than this changes nothing."""


def expansion_tables(by_bytes: Mapping[bytes, int]) -> ExpansionTables:
    """Build the trie, one depth at a time.

    Args:
        by_bytes: the ordinary old token of each byte string.

    Raises:
        ValueError: there is no token.
    """
    tokens = [(raw, token_id) for raw, token_id in by_bytes.items() if raw]
    if not tokens:
        raise ValueError("input-id expansion needs the ordinary tokens of an old tokenizer, and got none")
    length_V = np.array([len(raw) for raw, _ in tokens], dtype=np.int64)
    id_V = np.array([token_id for _, token_id in tokens], dtype=np.int64)
    flat = np.frombuffer(b"".join(raw for raw, _ in tokens), dtype=np.uint8).astype(np.int64)
    end_V = np.cumsum(length_V)
    node_V = np.zeros(len(tokens), dtype=np.int64)
    keys, ids, nodes = [], [], 1
    for depth in range(1, int(length_V.max()) + 1):
        alive = np.flatnonzero(length_V >= depth)
        key, which = np.unique(node_V[alive] * BYTES + flat[end_V[alive] - depth], return_inverse=True)
        node_V[alive] = nodes + which
        token = np.full(len(key), NONE, dtype=np.int64)
        ends = length_V[alive] == depth
        token[which[ends]] = id_V[alive[ends]]
        keys.append(key)
        ids.append(token)
        nodes += len(key)
    return ExpansionTables(np.concatenate(keys), np.concatenate(ids), int(length_V.max()))


def expand(ids_BT: Tensor, edge_key_E: Tensor, token_E: Tensor) -> Tensor:
    """Return, at every position, the longest old token that ends there.

    All positions walk backwards together and leave when no token goes on: as many rounds as the longest
    match has bytes, each over the positions that are left.

    Args:
        ids_BT: int64; ids below 256 are bytes, all others are none. Negative ids are none either.
        edge_key_E: of `ExpansionTables`, on the same device.
        token_E: likewise.

    Returns:
        int64 [B, T] old ids; NONE where no old token ends, and at what is no byte.
    """
    width = ids_BT.shape[1]
    ids = ids_BT.reshape(-1)
    found = torch.full_like(ids, NONE)
    place_K = torch.nonzero((ids >= 0) & (ids < BYTES))[:, 0]  # where the token would end
    node_K = torch.zeros_like(place_K)
    depth = 0
    while len(place_K):
        byte_K = ids[place_K - depth]
        key_K = node_K * BYTES + byte_K
        edge_K = torch.searchsorted(edge_key_E, key_K).clamp(max=len(edge_key_E) - 1)
        goes_on_K = (edge_key_E[edge_K] == key_K) & (byte_K >= 0) & (byte_K < BYTES)
        place_K, edge_K = place_K[goes_on_K], edge_K[goes_on_K]
        token_K = token_E[edge_K]
        found[place_K] = torch.where(token_K == NONE, found[place_K], token_K)
        depth += 1
        inside_K = place_K % width >= depth
        place_K, node_K = place_K[inside_K], edge_K[inside_K] + 1
    return found.view_as(ids_BT)
