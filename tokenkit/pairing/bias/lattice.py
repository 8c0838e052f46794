"""Which tokens of a Unigram model may end a text: those whose beginning no better path crosses.

    H = what stands before      b = token      the text H b ends in [b] where
      score(b) > score of any other way to spell b                                           and
      F(H) + score(b) > F(H without z) + score(z p) + F(b without p)   for every token z p

for z a suffix of H and p a prefix of b, neither empty. F(x) is the best sum of scores that spells x; a
character without a token costs 10 below the lowest score. Only the left side's F and the third term's know
H, so one threshold for each (z, b) serves every H that ends with z:

    F(H without z) - F(H) < threshold(z, b) = min over p of (score(b) - F(b without p) - score(z p))

The model adds scores in another order and breaks ties by its own rule: `slack` near 0 decides nothing.

Dimensions: S strings of the vocabulary, sorted; K characters; N texts that stand before; E tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenkit.tokenization.vocabulary import vocabulary_strings

UNKNOWN_PENALTY = 10.0
Floats = NDArray[np.float64]


class Lattice:
    """The scores of a Unigram model of a parsed tokenizer.json."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Read the scores."""
        ids = vocabulary_strings(model)
        self.score = {string: float(model["vocab"][token_id][1]) for string, token_id in ids.items()}
        self.score.pop("", None)
        scores = [float(score) for _, score in model["vocab"]]
        self._unknown = min(scores, default=0.0) - UNKNOWN_PENALTY
        self.margin = 1e-9 * (1 + max(map(abs, [*scores, self._unknown])))
        """Differences below this may be rounding."""
        self.strings = sorted(self.score)
        self.id_S = np.array([ids[string] for string in self.strings], np.int32)
        self.longest = max(map(len, self.strings), default=0)
        self.places: dict[str, tuple[int, int]] = {}
        """Of each prefix of a string: the strings that begin with it, as places [begin, end)."""
        for place, string in enumerate(self.strings):
            for n in range(1, len(string) + 1):
                begin, _ = self.places.get(string[:n], (place, 0))
                self.places[string[:n]] = begin, place + 1
        self._before: dict[str, list[float]] = {"": [0.0]}
        self._behind: dict[str, float] = {"": 0.0}
        self._fill_tables()

    def extensions(self, string: str) -> tuple[int, int]:
        """Return the places of the strings that begin with this one and are longer."""
        begin, end = self.places.get(string, (0, 0))
        return begin + (string in self.score), end

    def prefix_scores(self, text: str) -> list[float]:
        """Return F of every prefix of a text, the empty one first."""
        known_to = next(n for n in range(len(text), -1, -1) if text[:n] in self._before)
        scores = self._before[text[:known_to]]
        for end in range(known_to + 1, len(text) + 1):
            starts = range(max(0, end - self.longest), end)
            paths = [scores[i] + self.score[text[i:end]] for i in starts if text[i:end] in self.score]
            if text[end - 1] not in self.score:
                paths.append(scores[-1] + self._unknown)
            scores = self._before[text[:end]] = [*scores, max(paths)]
        return scores

    def slack(self, befores: Sequence[str], suffix: str) -> Floats:
        """Return by how much each extension of `suffix` wins behind each text, [N, E]; below 0: it loses.

        Args:
            befores: sorted by their reversed strings, so that those with a common suffix are neighbours.
            suffix: what the tokens begin with.
        """
        begin, end = self.extensions(suffix)
        slack_NE = np.repeat(self.own_S[None, begin:end], len(befores), axis=0)
        crossed: dict[str, tuple[int, list[float]]] = {}
        for n, before in enumerate(befores):
            scores = self.prefix_scores(before)
            for start in range(max(0, len(before) - self.longest), len(before)):
                if before[start:] + suffix[0] in self.places:
                    _, costs = crossed.setdefault(before[start:], (n, []))
                    costs.append(scores[start] - scores[-1])
        for end_of_before, (first, costs) in crossed.items():
            threshold_E = self._threshold(end_of_before, suffix)
            if threshold_E is not None:
                rows_NE = slack_NE[first : first + len(costs)]
                np.minimum(rows_NE, threshold_E - np.array(costs)[:, None], out=rows_NE)
        return slack_NE

    def _threshold(self, before: str, suffix: str) -> Floats | None:
        """Return the threshold for each extension of `suffix`; None if no token crosses its beginning."""
        begin, end = self.extensions(suffix)
        found = [
            self.worth_KS[k, begin:end] - self.score[before + suffix[:k]]
            for k in range(1, len(suffix) + 1)
            if before + suffix[:k] in self.score
        ]
        if before + suffix not in self.places:
            return np.minimum.reduce(found) if found else None
        threshold_E = np.minimum.reduce([np.full(end - begin, np.inf), *found])
        crossing = slice(*self.extensions(before + suffix))
        begin_C, end_C = self._rest_KS2[len(before), crossing].T
        for c in np.flatnonzero(begin_C < end_C).tolist():  # those whose rest begins a token
            string = self.strings[crossing.start + c]
            here = slice(int(begin_C[c]), int(end_C[c]))
            tokens = threshold_E[here.start - begin : here.stop - begin]
            worth_T = self.worth_KS[len(string) - len(before), here]
            np.minimum(tokens, worth_T - self.score[string], out=tokens)
        return threshold_E

    def _fill_tables(self) -> None:
        """Work out what depends on one string of the vocabulary alone."""
        K, S = self.longest + 1, len(self.strings)
        self.worth_KS = np.full((K, S), np.inf)
        """score(b) - F(b without its first k characters)."""
        self.own_S = np.full(S, np.inf)
        """By how much a token beats all other ways to spell it."""
        self._rest_KS2 = np.zeros((K, S, 2), np.int32)
        """Places of the strings that begin with b without its first k characters; begin = end: none do."""
        for place, string in enumerate(self.strings):
            score = self.score[string]
            for k in range(len(string), 0, -1):  # shortest rests first: each is made of shorter ones
                self.worth_KS[k, place] = worth = score - self._rest_score(string[k:])
                if k < len(string):
                    self._rest_KS2[k, place] = self.places.get(string[k:], (0, 0))
                    first = self.score.get(string[:k], self._unknown if k == 1 else None)
                    if first is not None:
                        self.own_S[place] = min(self.own_S[place], worth - first)

    def _rest_score(self, rest: str) -> float:
        """Return F of the end of a token."""
        known = self._behind.get(rest)
        if known is None:
            paths = [] if rest[0] in self.score else [self._unknown + self._rest_score(rest[1:])]
            for k in range(1, len(rest) + 1):
                if rest[:k] in self.score:
                    paths.append(self.score[rest[:k]] + self._rest_score(rest[k:]))
                elif rest[:k] not in self.places:
                    break
            known = self._behind[rest] = max(paths)
        return known
