"""Which tokens of a BPE may follow which: a pair is valid where no merge would have crossed its boundary.

    u = th        v = every      the text "thevery": does a merge eat over the boundary of th|every?

A token stands for the tree of merges that made it. While both tokens grow, the right edge of u is, one
after the other, each node of u's right spine (h, th), and the left edge of v each node of v's left spine
(e, ev, every). A merge (x, y) with x on the one and y on the other spine crosses the boundary if its rank
is below the rank that consumes x inside u, and not above the one that consumes y inside v (of equal ranks
the left one is first).

The tokens on whose left spine y lies form a subtree of the forest "token -> its left part", and those in
which y is consumed no earlier than by rank r are y and the children of rank >= r with all below them. With
children ordered by falling rank both are one interval of a depth-first numbering, so every merge rules
out an interval, and a token's invalid followers are a union of intervals.

Related: Berglund and van der Merwe 2023, "Formalizing BPE Tokenization", arXiv:2309.08715.

Dimensions: V vocabulary, P places of the numbering.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NEVER = 2**62  # the rank that consumes a whole token
NO, YES, DOUBT = 0, 1, 2
Intervals = tuple[NDArray[np.int64], ...]
"""Rank, begin and end of each, by rising rank."""


class Made(NamedTuple):
    """The last merge of a token: of which two tokens, by which rank."""

    left: int
    right: int
    rank: int


class Merges:
    """The merges of a BPE model of a parsed tokenizer.json."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Read the merges, and derive every token that they can make.

        Raises:
            ValueError: if the model is no BPE.
        """
        if model.get("type", "BPE") != "BPE" or not model.get("merges"):
            raise ValueError(f"pair validity is defined for BPE models: got {model.get('type')}")
        vocab = model["vocab"]
        pairs = [
            tuple(merge) if not isinstance(merge, str) else merge.split(" ", 1) for merge in model["merges"]
        ]
        known = [(x, y) for x, y in pairs if x in vocab and y in vocab and x + y in vocab]
        self.parts = [(vocab[x], vocab[y]) for x, y in known]
        self.result = [vocab[x + y] for x, y in known]
        self._rank = {pair: rank for rank, pair in enumerate(self.parts)}  # of a repeated one the last counts
        self.made: dict[int, Made] = {}
        """The last merge of each token that merges make of its characters, and that has more than one."""
        self._latest: dict[int, int] = {}
        self.single: set[int] = set()
        """Tokens of one character."""
        for string, token_id in vocab.items():
            if len(string) == 1:
                self.single.add(token_id)
            elif (
                made := self._derive([vocab.get(character, -1) for character in string], token_id)
            ) is not None:
                self.made[token_id] = made
        self._number(len(vocab) + max(vocab.values(), default=0) + 1)
        self._find_intervals()
        self._find_doubts()

    def is_made(self, token_id: int) -> bool:
        """Whether the merges turn the characters of this token into it."""
        return token_id in self.made or token_id in self.single

    def root_of(self, token_id: int) -> int:
        """Return the token of the first character; -1 where merges do not make `token_id`."""
        place = int(self.place_V[token_id])
        return -1 if place < 0 else int(self._root_P[place])

    def root_places(self, root: int) -> tuple[int, int]:
        """Return the places [begin, end) of all tokens that begin with this one's character."""
        return int(self.place_V[root]), self._end[root]

    def may_follow(self, token_id: int, root: int) -> NDArray[np.int8]:
        """Return for each place of a root's stretch whether that token may follow `token_id`: NO, YES, DOUBT.

        DOUBT: a merge is numbered before one that makes its parts (vocabularies converted from ranks have
        a few), so that the order of ranks is not that of events; ask the tokenizer itself.
        """
        begin, end = self.root_places(root)
        if token_id in self._doubtful_behind:
            return np.full(end - begin, DOUBT, np.int8)
        is_crossed_P, is_doubtful_P = (
            self._is_crossed(token_id, root, ruled_out) for ruled_out in (self._ruled_out, self._perhaps_out)
        )
        is_doubtful_P |= self._is_doubtful_P[begin:end]
        return np.where(is_crossed_P, NO, np.where(is_doubtful_P, DOUBT, YES)).astype(np.int8)

    def _is_crossed(self, token_id: int, root: int, ruled_out: Mapping[tuple[int, int], Intervals]) -> Any:
        """Return for each place of a root's stretch whether a merge crosses the boundary before it."""
        begin, end = self.root_places(root)
        change = np.zeros(end - begin + 1, np.int64)
        for node, consumed_by in self._right_spine(token_id):
            if (node, root) in ruled_out:
                rank_K, start_K, end_K = ruled_out[node, root]
                fires = int(np.searchsorted(rank_K, consumed_by))
                change += np.bincount(start_K[:fires] - begin, minlength=len(change))
                change -= np.bincount(end_K[:fires] - begin, minlength=len(change))
        return np.cumsum(change[:-1]) > 0

    def _derive(self, parts: list[int], token_id: int) -> Made | None:
        """Merge characters as the model does; None if something else than `token_id` comes out."""
        made = None
        while len(parts) > 1:
            ranks = [self._rank.get(pair, NEVER) for pair in pairwise(parts)]
            rank = min(ranks)
            if rank == NEVER:
                return None
            at = ranks.index(rank)
            made = Made(parts[at], parts[at + 1], rank)
            parts[at : at + 2] = [self.result[rank]]
        return made if parts == [token_id] else None

    def _number(self, size: int) -> None:
        """Number the forest depth first, the children of a token by falling rank."""
        children: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for token_id, made in self.made.items():
            children[made.left].append((-made.rank, token_id))
        for kids in children.values():
            kids.sort()
        self._children = children
        self.place_V = np.full(size, -1, np.int64)
        self._end: dict[int, int] = {}
        root_P: list[int] = []
        for root in sorted(self.single):
            stack: list[tuple[int, bool]] = [(root, False)]
            while stack:
                node, is_done = stack.pop()
                if is_done:
                    self._end[node] = len(root_P)
                    continue
                self.place_V[node] = len(root_P)
                root_P.append(root)
                stack.append((node, True))
                stack += [(child, False) for _, child in reversed(children.get(node, ()))]
        self._root_P = np.array(root_P, np.int64)

    def _find_intervals(self) -> None:
        """For each (left token, root): which places its merges rule out, by rising rank."""
        found: list[dict[tuple[int, int], list[tuple[int, int, int]]]] = [
            defaultdict(list),
            defaultdict(list),
        ]
        for rank, (x, y) in enumerate(self.parts):
            if self.place_V[y] < 0 or self._rank[x, y] != rank:
                continue
            kids = self._children.get(y, ())
            later = bisect_right(kids, (-rank, NEVER))  # the children of rank >= this one's come first
            begin = int(self.place_V[y])
            end = self._end[kids[later - 1][1]] if later else begin + 1
            found[self._is_irregular(x, y, rank)][x, int(self._root_P[begin])].append((rank, begin, end))
        self._ruled_out, self._perhaps_out = (
            {key: tuple(np.array(rows, np.int64).T) for key, rows in half.items()} for half in found
        )

    def _find_doubts(self) -> None:
        """Mark the tokens whose own tree, or whose spine, has a merge numbered before those of its parts."""
        irregular = {z for z, made in self.made.items() if self._is_irregular(*made)}
        self._is_doubtful_P = np.zeros(len(self._root_P), np.bool_)
        for token_id in irregular:
            place = int(self.place_V[token_id])
            self._is_doubtful_P[place : self._end[token_id]] = True
        self._doubtful_behind = {
            token_id
            for token_id in self.made
            if irregular and any(node in irregular for node, _ in self._right_spine(token_id))
        }

    def _is_irregular(self, x: int, y: int, rank: int) -> bool:
        """Whether a merge is numbered before one that its parts have to wait for."""
        return max(self._when(x), self._when(y)) >= rank

    def _when(self, token_id: int) -> int:
        """Return the highest rank below a token: it cannot be there before that one was merged."""
        known = self._latest.get(token_id)
        if known is None:
            made = self.made.get(token_id)
            known = -1 if made is None else max(made.rank, self._when(made.left), self._when(made.right))
            self._latest[token_id] = known
        return known

    def _right_spine(self, token_id: int) -> Sequence[tuple[int, int]]:
        """Return each node of the right spine with the rank that consumes it."""
        spine = [(token_id, NEVER)]
        while (made := self.made.get(spine[-1][0])) is not None:
            spine.append((made.right, made.rank))
        return spine
