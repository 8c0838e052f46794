"""Covers of a Unigram by its scores: what its model sees of a text, and which of its tokens then ends it.

The model sees what normalizer and pre-tokenizer leave: of a head and a token behind it, their characters with
a mark for each space, or the token alone where they cut in front of it. Which of these it is depends on the
kinds of characters alone, so it is asked once for each pair of signatures (`signatures.py`). Texts
with characters that a normalizer changes or joins, pairs that fit none of these, and scores too near to tell
(`lattice.py`) go to the tokenizer itself.

Dimensions: N heads, E tokens that begin with the same suffix, S strings of the vocabulary.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenkit.pairing.bias.lattice import Lattice
from tokenkit.pairing.bias.signatures import UNKNOWN, Signatures, is_stable
from tokenkit.pairing.bias.writing import ByWriting, Ids, Lexicon, Writer, decoded
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.vocabulary import METASPACE, plain_text_document

CELLS = 2**21  # heads x tokens that are compared at once
TABLE_CELLS = 2**26  # of 16 bytes: 250k strings of 260 characters
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Prepend", "Replace", "Lowercase", "StripAccents"}
NORMALIZERS |= {"Nmt", "Strip"}
PRE_TOKENIZERS = {"Metaspace", "WhitespaceSplit", "Whitespace", "Punctuation", "Digits", "BertPreTokenizer"}
BEHIND_HEAD, ALONE, BEHIND_MARK, UNCLEAR = 0, 1, 2, 3
"""What the model sees of head and token: both; the token; a mark and the token; something else."""


class Row(NamedTuple):
    """A token whose suffix, behind its head, begins other tokens."""

    text: bytes
    cut: int
    """Bytes of the head."""
    seen: str
    """What the model sees of the head."""
    sign: int


def is_predictable(tokenizer: Tokenizer) -> bool:
    """Whether this module knows what the model of a tokenizer sees: kinds of characters decide it."""
    document = plain_text_document(tokenizer.document)
    model = document["model"]
    if model["type"] != "Unigram" or model.get("unk_id") is None:
        return False
    if tokenizer.vocabulary.alphabet == "byte-level":
        return False
    if len(model["vocab"]) * max(len(string) for string, _ in model["vocab"]) > TABLE_CELLS:
        return False
    cuts = _parts(document.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback"):
        *cuts, _ = cuts  # cuts only at "<", where texts with it are not asked about here
    changes = _parts(document.get("normalizer"), "normalizers")
    return all(part["type"] in PRE_TOKENIZERS for part in cuts) and all(
        part["type"] in NORMALIZERS
        and (part["type"] != "Replace" or part["pattern"].get("Regex", " {2,}") == " {2,}")
        for part in changes
    )


def _parts(part: Any, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [leaf for member in part[key] for leaf in _parts(member, key)] if key in part else [part]


class ByScores:
    """Candidates of a Unigram are decided by its scores, where its pipeline lets them."""

    def __init__(self, tokenizer: Tokenizer, writer: Writer, vocabulary: Lexicon) -> None:
        """Read the scores, and what the model sees of each token."""
        document = plain_text_document(tokenizer.document)
        self.lattice = Lattice(document["model"])
        self.vocabulary, self.by_writing = vocabulary, ByWriting(writer, vocabulary)
        self.pipeline = _Pipeline(tokenizer, writer)
        spelled = [self.pipeline.spell(decoded(text) or "") for text in tokenizer.token_bytes]
        strings, ids = self.lattice.strings, self.lattice.id_S.tolist()
        self.is_token_S = np.array(
            [
                not tokenizer.is_special_V[i] and spelled[i] == string
                for string, i in zip(strings, ids, strict=True)
            ],
            np.bool_,
        )
        known = set(self.lattice.id_S[self.is_token_S].tolist())
        texts = np.flatnonzero(~tokenizer.is_special_V).tolist()
        self.others = {i for i in texts if i not in known}
        """Text tokens whose string is not what the model sees of them."""
        self.sign_S = np.array([self.pipeline.sign(tokenizer.token_bytes[i]) for i in ids], np.int64)
        self.behind_mark_S = self._behind_mark()
        self._rows: dict[str, list[Row]] = defaultdict(list)

    def covered(self, text: bytes) -> Iterable[tuple[int, Ids]]:
        """Take all candidates of a token down; `settle` decides."""
        string = decoded(text)
        for cut in range(1, len(text)):
            head = decoded(text[:cut])
            if string is None or head is None:
                self.by_writing.ask(text, cut, self.vocabulary.extensions(text[cut:]))
                continue
            if self.others:
                behind = self.vocabulary.extensions(text[cut:]).tolist()
                self.by_writing.ask(text, cut, np.array([b for b in behind if b in self.others], np.int32))
            suffix = self.pipeline.spell(string[len(head) :])
            begin, end = self.lattice.extensions(suffix)
            if begin < end:
                row = Row(text, cut, self.pipeline.seen(head), self.pipeline.sign(text[:cut]))
                self._rows[suffix].append(row)
        return ()

    def settle(self, found: dict[bytes, list[tuple[int, Ids]]]) -> None:
        """Decide, one suffix at a time; then add what the tokenizer said."""
        for suffix, rows in self._rows.items():
            begin, end = self.lattice.extensions(suffix)
            place_E = begin + np.flatnonzero(self._is_asked(suffix, rows[0], begin, end))
            rows.sort(key=lambda row: row.seen[::-1])
            step = max(1, CELLS // (end - begin)) if len(place_E) else len(rows)
            for start in range(0, len(rows) if len(place_E) else 0, step):
                self._decide(suffix, rows[start : start + step], place_E, found)
        self.by_writing.settle(found)

    def _is_asked(self, suffix: str, row: Row, begin: int, end: int) -> NDArray[np.bool_]:
        """Return which extensions of a suffix are tokens whose rest is kept."""
        is_asked_E = self.is_token_S[begin:end].copy()
        if self.vocabulary.kept is not None:
            inside = len(row.text) - row.cut
            for e in np.flatnonzero(is_asked_E).tolist():
                token = self.vocabulary.bytes_of(int(self.lattice.id_S[begin + e]))
                is_asked_E[e] = token[inside:] in self.vocabulary.kept
        return is_asked_E

    def _decide(
        self,
        suffix: str,
        rows: list[Row],
        place_E: NDArray[np.int64],
        found: dict[bytes, list[tuple[int, Ids]]],
    ) -> None:
        """Decide the tokens at `place_E`, extensions of a suffix, behind some heads."""
        begin, _ = self.lattice.extensions(suffix)
        slack_NE = self.lattice.slack([row.seen for row in rows], suffix)[:, place_E - begin]
        sign_N = np.array([row.sign for row in rows])
        view_NE = self.pipeline.views(sign_N, self.sign_S[place_E])
        for view, slack_E in (
            (ALONE, self.lattice.own_S[place_E]),
            (BEHIND_MARK, self.behind_mark_S[place_E]),
            (UNCLEAR, np.zeros(len(place_E))),
        ):
            np.copyto(slack_NE, slack_E, where=view_NE == view)
        id_E = self.lattice.id_S[place_E]
        is_near_NE = np.abs(slack_NE) <= self.lattice.margin
        for n in np.flatnonzero(is_near_NE.any(axis=1)).tolist():
            self.by_writing.ask(rows[n].text, rows[n].cut, id_E[is_near_NE[n]])
        is_won_NE = slack_NE > self.lattice.margin
        for n in np.flatnonzero(is_won_NE.any(axis=1)).tolist():
            text, cut = rows[n].text, rows[n].cut
            found[text].append((len(text) - cut, id_E[is_won_NE[n]]))

    def _behind_mark(self) -> NDArray[np.float64]:
        """Return by how much each token wins behind a mark alone."""
        slack_S = self.lattice.own_S.copy()
        for first in {string[0] for string in self.lattice.strings}:
            begin, end = self.lattice.extensions(first)
            slack_S[begin:end] = self.lattice.slack([METASPACE], first)[0]
        return slack_S


class _Pipeline:
    """What the model sees of a text."""

    def __init__(self, tokenizer: Tokenizer, writer: Writer) -> None:
        self._normalizer, self._pre_tokenizer = writer.rust.normalizer, writer.rust.pre_tokenizer
        self._has_marks = tokenizer.vocabulary.alphabet == "metaspace"
        self._signatures = Signatures(tokenizer, writer)
        document = plain_text_document(tokenizer.document)
        patterns = [
            part["pattern"].get("String", "") for part in _parts(document.get("normalizer"), "normalizers")
            if part["type"] == "Replace"
        ]  # fmt: skip
        self._refused = {c for pattern in patterns if len(pattern) > 1 for c in pattern}
        if document["model"].get("byte_fallback"):
            self._refused.add("<")
        self._is_plain: dict[str, bool] = {}
        self._views: dict[tuple[int, int], int] = {}

    def spell(self, text: str) -> str:
        """Return a text with the marks of the vocabulary."""
        return text.replace(" ", METASPACE) if self._has_marks else text

    def seen(self, text: str) -> str:
        """Return the last piece that the model gets."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._pre_tokenizer is None:
            return text
        pieces = self._pre_tokenizer.pre_tokenize_str(text)
        return pieces[-1][0] if pieces else ""

    def sign(self, text: bytes) -> int:
        """Return the number of a text's signature; UNKNOWN where a normalizer may change it."""
        string = decoded(text)
        if string is None or not all(map(self._stays, string)):
            return UNKNOWN
        return self._signatures.of(text)

    def views(self, sign_N: NDArray[np.int64], sign_E: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what the model sees of each head with each token behind it, [N, E]."""
        heads, back_N = np.unique(sign_N, return_inverse=True)
        tokens, back_E = np.unique(sign_E, return_inverse=True)
        table = np.array([[self._view(head, token) for token in tokens.tolist()] for head in heads.tolist()])
        return table[back_N][:, back_E]

    def _view(self, head: int, token: int) -> int:
        if head == UNKNOWN or token == UNKNOWN:
            return UNCLEAR
        known = self._views.get((head, token))
        if known is None:
            first, second = self._signatures.string(head), self._signatures.string(token)
            seen, behind = self.seen(first + second), self.spell(second)
            views = {METASPACE: BEHIND_MARK, "": ALONE, self.seen(first): BEHIND_HEAD}
            known = views.get(seen.removesuffix(behind), UNCLEAR) if seen.endswith(behind) else UNCLEAR
            self._views[head, token] = known
        return known

    def _stays(self, character: str) -> bool:
        """Whether no normalizer changes a character or joins it with its neighbours."""
        known = self._is_plain.get(character)
        if known is None:
            known = self._is_plain[character] = character not in self._refused and self._is_left(character)
        return known

    def _is_left(self, character: str) -> bool:
        if not character.isascii():
            kind = unicodedata.category(character)
            # Beyond these lie clusters of several characters: marks, joiners, flags, emoji.
            if not (kind[0] in "LNP" or kind in ("Sc", "Sm")) or ord(character) > 0xFFFF:
                return False
            if not is_stable(character):
                return False
        if self._normalizer is None:
            return True
        framed = f"a{character}a"  # a space at an end might be stripped
        return self._normalizer.normalize_str(framed) in (framed, self.spell(framed))
