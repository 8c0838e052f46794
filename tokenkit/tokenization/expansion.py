"""Input-id expansion: at every byte, the longest old token that ends there.

    text          t  h  e     c  a  t
    old token     t  th the ␣ ␣c ␣ca ␣cat     (of an old vocabulary that has them all)

    expanded_t = argmax of |w| over old tokens w with w = bytes of ids[t - |w| + 1 .. t]

A token lies within consecutive byte ids. Whatever is no byte (a special token, a template piece, padding)
has no expansion itself, and no token reaches across it. Only ordinary old tokens count.

The tables are a trie of the reversed tokens, in which every position walks backwards as deep as it can. If
depth d is in the trie, so is every smaller one; so the walk takes blocks of 2^k bytes, the largest first,
each if there is such an edge: the binary digits of the depth. Each block has a name, made of the names of
its halves. So there are as many rounds as the longest token has binary digits, whatever the text: nothing
is asked of a GPU on the way.

Source: input-id expansion of the byte students in Minixhofer et al. 2025, arXiv:2503.20083.
Dimensions: P blocks of two or more bytes, E edges, F bytes of all old tokens together, V old tokens.
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

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ExpansionTables:
    """A trie of reversed tokens as flat arrays.

    A block of one byte is named by its value, the others 256 .. 255 + P. Keys are made with N = 257 + P, one
    more than there are names: so no pair in which NONE stands for a name has a key.
    """

    block_key_P: Ints
    """Strictly rising: name of the later half * N + name of the earlier half; the index + 256 is the name."""
    edge_key_E: Ints
    """Strictly rising: node * N + name of the block. Node 0 is the root, edge e leads to node e + 1."""
    token_E: Ints
    """The longest old id that is spelled, read backwards, on the way to the node of each edge, or NONE."""
    max_bytes: int
    """The longest token; what stands further back than this changes nothing."""


def expansion_tables(by_bytes: Mapping[bytes, int]) -> ExpansionTables:
    """Build the trie of the reversed tokens.

    Args:
        by_bytes: the ordinary old token of each byte string.

    Raises:
        ValueError: there is no token.
    """
    tokens = [(raw, token_id) for raw, token_id in by_bytes.items() if raw]
    if not tokens:
        raise ValueError("input-id expansion needs the ordinary tokens of an old tokenizer, and got none")
    length_V = np.array([len(raw) for raw, _ in tokens])
    flat_F = np.frombuffer(b"".join(raw[::-1] for raw, _ in tokens), dtype=np.uint8).astype(np.int64)
    end_V = np.cumsum(length_V)
    start_F = np.repeat(end_V - length_V, length_V)
    depth_F = np.arange(len(flat_F)) - start_F + 1
    block_key_P, block_F = _name_blocks(flat_F, depth_F, np.repeat(length_V, length_V))
    edge_key_E, node_F = _number_nodes(block_F, depth_F, BYTES + len(block_key_P) + 1)

    token_E = np.full(len(edge_key_E), NONE, dtype=np.int64)
    token_E[node_F[end_V - 1] - 1] = [token_id for _, token_id in tokens]
    ends_F = np.where(token_E[node_F - 1] == NONE, NONE, np.arange(len(flat_F)))
    last_F = np.maximum.accumulate(ends_F)  # where the longest token up to here ends, if it is this token's
    token_E[node_F - 1] = np.where(last_F >= start_F, token_E[node_F[last_F] - 1], NONE)
    return ExpansionTables(block_key_P, edge_key_E, token_E, int(length_V.max()))


def _name_blocks(flat_F: Ints, depth_F: Ints, length_F: Ints) -> tuple[Ints, Ints]:
    """Return the key of each block, and at each depth the name of the block that leads there.

    A block of 2^k bytes begins at a multiple of 2^k; that which leads to depth d has as many bytes as the
    lowest binary digit of d says.
    """
    large, level_F = BYTES + len(flat_F), flat_F  # more names than there can be
    block_F, levels = np.zeros_like(flat_F), []
    size, named = 1, BYTES
    while True:
        begins = np.flatnonzero(((depth_F - 1) % (2 * size) == 0) & (depth_F - 1 + size <= length_F))
        block_F[begins + size - 1] = level_F[begins]
        begins = begins[depth_F[begins] - 1 + 2 * size <= length_F[begins]]
        if not len(begins):
            break
        key, which = np.unique(level_F[begins] * large + level_F[begins + size], return_inverse=True)
        level_F = np.zeros_like(flat_F)
        level_F[begins] = named + which
        levels.append(key)
        named += len(key)
        size *= 2
    first_P, second_P = np.divmod(np.concatenate([*levels, np.zeros(0, dtype=np.int64)]), large)
    return first_P * (named + 1) + second_P, block_F


def _number_nodes(block_F: Ints, depth_F: Ints, radix: int) -> tuple[Ints, Ints]:
    """Return the key of each edge, and the node of each depth of each token.

    A node's parent has its depth without the lowest binary digit. Numbered by how many digits the depth
    has that are 1, parents come first and keys rise.
    """
    step_F = depth_F & -depth_F
    node_F = np.zeros_like(depth_F)
    ones_F = np.array([int(depth).bit_count() for depth in range(int(depth_F.max()) + 1)])[depth_F]
    keys, nodes = [], 1
    for ones in range(1, int(ones_F.max()) + 1):
        here = np.flatnonzero(ones_F == ones)
        parent = np.where(step_F[here] == depth_F[here], 0, node_F[here - step_F[here]])
        key, which = np.unique(parent * radix + block_F[here], return_inverse=True)
        node_F[here] = nodes + which
        keys.append(key)
        nodes += len(key)
    return np.concatenate(keys), node_F


def expand(
    ids_BT: Tensor, block_key_P: Tensor, edge_key_E: Tensor, token_E: Tensor, max_bytes: int
) -> Tensor:
    """Return, at every position, the longest old token that ends there.

    Args:
        ids_BT: int64; ids below 256 are bytes, all others are none. Negative ids are none either.
        block_key_P: of `ExpansionTables`, on the same device.
        edge_key_E: likewise.
        token_E: likewise.
        max_bytes: likewise.

    Returns:
        int64 [B, T] old ids; NONE where no old token ends, and at what is no byte.
    """
    radix = BYTES + len(block_key_P) + 1
    place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    levels = [torch.where((ids_BT >= 0) & (ids_BT < BYTES), ids_BT, NONE)]  # names of blocks that end here
    for level in range(1, max_bytes.bit_length()):
        name_BT = levels[-1]
        before_BT = names_at(name_BT, place_BT - 2 ** (level - 1))
        block_BT = index_of_pairs(block_key_P, name_BT, before_BT, radix)
        levels.append(torch.where(block_BT == NONE, NONE, block_BT + BYTES))
    node_BT, end_BT = torch.zeros_like(ids_BT), place_BT
    for level, name_BT in reversed(list(enumerate(levels))):
        edge_BT = index_of_pairs(edge_key_E, node_BT, names_at(name_BT, end_BT), radix)
        node_BT = torch.where(edge_BT == NONE, node_BT, edge_BT + 1)
        end_BT = torch.where(edge_BT == NONE, end_BT, end_BT - 2**level)
    return torch.where(node_BT == 0, NONE, token_E[(node_BT - 1).clamp(min=0)])


def names_at(name_BT: Tensor, place_BT: Tensor) -> Tensor:
    """Return the names at other places of the rows; NONE before a row's begin."""
    return torch.where(place_BT < 0, NONE, name_BT.gather(1, place_BT.clamp(min=0)))


def index_of_pairs(key_K: Tensor, first_BT: Tensor, second_BT: Tensor, radix: int) -> Tensor:
    """Return the index of each pair's key; NONE where there is no such key."""
    wanted_BT = first_BT * radix + second_BT
    index_BT = torch.searchsorted(key_K, wanted_BT).clamp(max=len(key_K) - 1)
    return torch.where(key_K[index_BT] == wanted_BT, index_BT, NONE)
