"""What templates write around the texts of a document, and where it lies on the shared axis.

A document is a row of texts (a plain text, or the messages of a conversation) with a *gap* before, between
and after them. Each tokenizer writes the pieces of its own template into the gaps. An atom that all of
them can write takes one unit of the axis; a piece that says none of those has no partner.
Special tokens inside the text of a message cut its turn: `special_pattern` finds them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenkit.errors import TemplateError
from tokenkit.structs import UNPAIRED, Tokens
from tokenkit.tokenization.backend import Before
from tokenkit.tokenization.chat.families import (
    AFTER_TURN,
    BOS,
    END_TURN,
    EOS,
    HEADER,
    NEXT,
    OPENS,
    Family,
    Piece,
)
from tokenkit.tokenization.chat.template import marked
from tokenkit.tokenization.files.saving import has_own_template
from tokenkit.tokenization.tokenizer import Tokenizer

ORDER = {atom: rank for rank, atom in enumerate((END_TURN, AFTER_TURN, EOS, BOS, *HEADER, OPENS))}
Atom = tuple[int, str]  # (turn that it belongs to, name)
Said = tuple[str, tuple[Atom, ...]]  # a piece's text, and the atoms that it says here
_CLOSING = (END_TURN, AFTER_TURN, EOS)


@dataclass(frozen=True)
class Plan:
    """What is written around texts, apart from the texts: documents with equal plans share one layout."""

    roles: tuple[str, ...]
    """The role of each message; empty: one plain text."""
    writes_bos: bool
    writes_eos: bool
    """Of plain text; a conversation ends as its family says."""
    is_whole: bool = False
    """The texts hold what a template writes in front of an answer for the model."""

    @property
    def texts(self) -> int:
        """How many texts the gaps surround."""
        return len(self.roles) or 1


@dataclass(frozen=True)
class Gap:
    """The template tokens of one tokenizer between two texts."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    """Units from the gap's start; UNPAIRED."""
    closes: NDArray[np.bool_]
    """The token ends the text before it: it is trained if that text is."""
    opens: NDArray[np.bool_]
    """The token belongs to the text behind it, as far as training goes."""
    width: int
    """Units that the gap takes on the shared axis."""
    before: Before
    """What stands before the text that follows."""


@dataclass
class _Written:
    """A piece as one tokenizer writes it."""

    ids: list[int]
    atoms: tuple[Atom, ...]


@functools.lru_cache(maxsize=512)  # conversations of a data set share few plans
def layouts(plan: Plan, tokenizers: tuple[Tokenizer, ...]) -> list[list[Gap]]:
    """Return the gaps of a plan, one list per tokenizer.

    Raises:
        ValueError: a tokenizer that has no way to write messages.
    """
    written = [_write_gaps(plan, tokenizer, is_first=tokenizer is tokenizers[0]) for tokenizer in tokenizers]
    result: list[list[Gap]] = [[] for _ in tokenizers]
    for index in range(plan.texts + 1):
        sides = [gaps[index] for gaps in written]
        shared = set.intersection(*({a for piece in pieces for a in piece.atoms} for pieces, _ in sides))
        unit = {atom: rank for rank, atom in enumerate(sorted(shared, key=lambda a: (a[0], ORDER[a[1]])))}
        for side, (pieces, before) in zip(result, sides, strict=True):
            side.append(_gap(pieces, unit, before, closed_turn=index - 1))
    return result


def _gap(pieces: Iterable[_Written], unit: dict[Atom, int], before: Before, closed_turn: int) -> Gap:
    ids: list[int] = []
    ends: list[int] = []
    closes: list[bool] = []
    opens: list[bool] = []
    position = 0
    for piece in pieces:
        paired = [unit[atom] for atom in piece.atoms if atom in unit]
        if paired:
            # All but the last token have no width: no boundary lies inside a piece.
            end = max(paired) + 1
            ends += [position] * (len(piece.ids) - 1) + [end]
            position = end
        else:
            ends += [UNPAIRED] * len(piece.ids)
        ids += piece.ids
        is_closing = any(atom in ((closed_turn, END_TURN), (closed_turn, EOS)) for atom in piece.atoms)
        closes += [is_closing] * len(piece.ids)
        opens += [_opens(piece.atoms)] * len(piece.ids)
    return Gap(
        ids=np.array(ids, np.int32),
        ends=np.array(ends, np.int64),
        closes=np.array(closes, bool),
        opens=np.array(opens, bool),
        width=len(unit),
        before=before,
    )


def _write_gaps(plan: Plan, tokenizer: Tokenizer, *, is_first: bool) -> list[tuple[list[_Written], Before]]:
    gaps = _plain_gaps(plan, tokenizer) if not plan.roles else _chat_gaps(plan, tokenizer, is_first=is_first)
    texts = plan.texts
    result = []
    for index, pieces in enumerate(gaps):
        writer = _GapWriter(tokenizer, "text" if index else "start")
        # BOS in front of a plain text changes nothing for the text: it is still the start.
        keeps_start = not plan.roles and index == 0
        handed = _hand_over(pieces, index < texts)
        ids = writer.write([text for text, _ in handed], text_follows=index < texts)
        written = [_Written(own, atoms) for own, (_, atoms) in zip(ids, handed, strict=True)]
        before: Before = "space" if _ends_in_space(pieces) else "start" if keeps_start else writer.before
        result.append(([piece for piece in written if piece.ids], before))
    return result


def _plain_gaps(plan: Plan, tokenizer: Tokenizer) -> list[list[Said]]:
    tokens = tokenizer.family.tokens
    first: list[Said] = []
    last: list[Said] = []
    if plan.writes_bos and tokenizer.family.writes_bos and tokenizer.bos_id is not None:
        first.append((tokens[BOS], ((0, BOS),)))
    if plan.writes_eos and tokenizer.eos_id is not None:
        last.append((tokens[EOS], ((0, EOS),)))
    return [first, last]


def _chat_gaps(plan: Plan, tokenizer: Tokenizer, *, is_first: bool) -> list[list[Said]]:
    """Return the pieces around the texts of a conversation, a turn's own parts included."""
    parts = [role.split(CONTINUES) for role in plan.roles]
    begins = [index for index, (role, *_) in enumerate(parts) if role]
    turns = _turn_gaps(tuple(parts[index][0] for index in begins), tokenizer, is_first=is_first)
    # An atom belongs to the last text of its turn, which is the one that the turn's end stands behind.
    ends = [index - 1 for index in (*begins[1:], plan.texts)]
    gaps: list[list[Said]] = [[] for _ in range(plan.texts + 1)]
    for index, gap in zip((*begins, plan.texts), turns, strict=True):
        for text, atoms in gap:
            if not (plan.is_whole and _opens(atoms)):
                gaps[index].append((text, tuple((ends[turn], name) for turn, name in atoms)))
    for index, (_, *strings) in enumerate(parts):
        gaps[index] += [(string, ((index, OPENS),)) for string in strings]
    return gaps


@functools.lru_cache(maxsize=512)  # as `layouts`
def around_turns(roles: tuple[str, ...], tokenizer: Tokenizer) -> list[str]:
    """Return what a tokenizer's template writes around turns, without what it leaves to the model.

    Raises:
        ValueError: the template does not write these roles.
    """
    gaps = _turn_gaps(roles, tokenizer, is_first=True)
    return ["".join(text for text, atoms in gap if not _opens(atoms)) for gap in gaps]


def _opens(atoms: Sequence[Atom]) -> bool:
    return any(atom == OPENS for _, atom in atoms)


def _turn_gaps(roles: tuple[str, ...], tokenizer: Tokenizer, *, is_first: bool) -> list[list[Said]]:
    """Return the pieces around turns: those of a family, or all that the template writes there.

    A template that does not write these roles leaves it to the pieces of its turns, where the texts are
    another tokenizer's (`is_first` is false).
    """
    composed = _composed(roles, tokenizer.chat)
    if not has_own_template(tokenizer) or tokenizer.chat_template is None:
        return composed
    template, tokens = tokenizer.chat_template, tokenizer.family.tokens
    try:
        written = marked(template, tokens, roles)
    except TemplateError as error:
        if is_first:
            raise ValueError(f"the chat template does not write the conversation: {error}") from error
        return composed
    result = []
    for index, (text, pieces) in enumerate(zip(written, composed, strict=True)):
        said, opening = _matched(text, pieces)
        if opening:
            prompt = 0
            if 0 < index < len(roles) and roles[index] == "assistant":
                with suppress(TemplateError):
                    generated = marked(template, tokens, roles[:index], generates=True)[-1]
                    if text.startswith(generated):
                        prompt = max(0, len(generated) - (len(text) - len(opening)))
            said += [(opening[:prompt], ()), (opening[prompt:], ((index, OPENS),))]
        result.append([piece for piece in said if piece[0]])
    return result


def _matched(text: str, pieces: Sequence[Said]) -> tuple[list[Said], str]:
    """Find the pieces of a gap in what a template writes there, and return what stands behind the last.

    What stands between an end and the next header is a piece that says nothing.
    """
    if text == "".join(piece for piece, _ in pieces):
        return list(pieces), ""
    said: list[Said] = []
    rest = list(pieces)
    while rest and text.startswith(rest[0][0]) and _stands_first(rest[0]):
        said.append(rest[0])
        text = text.removeprefix(rest.pop(0)[0])
    rest = [piece for piece in rest if not _stands_first(piece)]
    for first in range(len(rest)):
        header = "".join(piece for piece, _ in rest[first:])
        if (at := text.rfind(header)) >= 0:
            return [*said, (text[:at], ()), *rest[first:]], text[at + len(header) :]
    return [*said, (text, ())], ""


def _stands_first(piece: Said) -> bool:
    return any(atom in (*_CLOSING, BOS) for _, atom in piece[1])


def _composed(roles: Sequence[str], family: Family) -> list[list[Said]]:
    """Return the pieces of the turns. A role that the family lacks is the user's.

    A system text then stands in the turn of the user's message behind it.
    """
    gaps: list[list[Said]] = [[] for _ in range(len(roles) + 1)]
    if family.writes_bos:
        gaps[0].append((family.tokens[BOS], ((0, BOS),)))
    last = len(roles) - 1
    user, joined = family.turns["user"], False
    for turn, role in enumerate(roles):
        own = family.turns.get(role, user)
        joins_next = role == "system" and own is user and roles[turn + 1 : turn + 2] == ("user",)
        if not joined:
            if own is user and turn and family.repeats_bos:
                gaps[turn].append((family.tokens[BOS], ((turn, BOS),)))
            gaps[turn] += [_as_said(piece, turn, opens_next=False) for piece in own.header]
        joined = joins_next
        if joins_next:
            gaps[turn + 1].append((family.joins_system, ()))
            continue
        opens_next = turn < last and not family.turns.get(roles[turn + 1], user).header
        gaps[turn + 1] += [_as_said(piece, turn, opens_next) for piece in own.end]
    if family.ends_chat_with_eos:
        gaps[-1].append((family.tokens[EOS], ((last, EOS),)))
    return gaps


def _as_said(piece: Piece, turn: int, opens_next: bool) -> Said:
    """Return a piece's text and the atoms that it says here; where it opens no answer, its space goes too."""
    own = tuple((turn, atom) for atom in piece.atoms if not atom.startswith(NEXT))
    following = tuple((turn + 1, atom.removeprefix(NEXT)) for atom in piece.atoms if atom.startswith(NEXT))
    if following and not opens_next:
        return piece.text.rstrip(" "), own
    return piece.text, own + following


def _ends_in_space(pieces: Sequence[Said]) -> bool:
    return bool(pieces) and pieces[-1][0].endswith(" ")


def _hand_over(pieces: Sequence[Said], text_follows: bool) -> Sequence[Said]:
    """Take a space at the very end away: the text that follows writes it (`backend.Before`)."""
    if not text_follows or not _ends_in_space(pieces):
        return pieces
    *rest, (text, atoms) = pieces
    return [*rest, (text[:-1], atoms)]


def template_ids(tokenizer: Tokenizer, written: str) -> list[int]:
    """Return the ids of a rendered conversation, as a saved tokenizer reads it."""
    (ids,) = _GapWriter(tokenizer, "start").write([written], text_follows=False)
    return ids


class _GapWriter:
    """Writes the pieces of one gap, cut as the tokenizer would cut the rendered template."""

    def __init__(self, tokenizer: Tokenizer, before: Before) -> None:
        """Begin a gap at the start of the document or behind a text."""
        self.tokenizer, self.before = tokenizer, before
        self._control, _ = special_pattern(tokenizer)
        self._swallowing = {
            token["content"] for token in tokenizer.document.get("added_tokens") or [] if token.get("rstrip")
        }

    def write(self, pieces: Sequence[str], text_follows: bool) -> list[list[int]]:
        """Return the ids of each piece: special tokens where their strings stand, text in between."""
        ids: list[list[int]] = [[] for _ in pieces]
        run: list[tuple[int, str]] = []  # text without a special token in it, piece by piece
        strips = False  # the special token just written swallows whitespace
        for index, piece in enumerate(pieces):
            parts = self._control.split(piece) if self._control else [piece]
            for number, part in enumerate(parts):
                if number % 2:
                    self._write_run(run, ids, text_follows=False)
                    run, strips = [], part in self._swallowing
                    ids[index].append(self.tokenizer.control[part])
                    self.before = "special"
                elif text := part.lstrip() if strips else part:
                    run.append((index, text))
                    strips = False
        self._write_run(run, ids, text_follows)
        return ids

    def _write_run(self, run: Sequence[tuple[int, str]], ids: list[list[int]], text_follows: bool) -> None:
        """Encode neighbouring texts as one, and share the tokens out where none lies across a border."""
        if not run:
            return
        borders = np.cumsum([len(text.encode()) for _, text in run])
        # A letter stands for the text that follows: GPT-2 cuts a run of newlines differently before one.
        tokens = self._encode("".join(text for _, text in run) + ("a" if text_follows else ""))
        if tokens is not None and np.isin(borders, tokens.byte_ends).all():
            owners = np.searchsorted(borders, tokens.byte_ends)
            for token_id, owner in zip(tokens.ids.tolist(), owners, strict=True):
                if owner < len(run):
                    ids[run[owner][0]].append(token_id)
            self.before = "text"
            return
        for index, text in run:
            tokens = self._encode(text)
            if tokens is not None:
                ids[index] += tokens.ids.tolist()
            self.before = "text"

    def _encode(self, text: str) -> Tokens | None:
        (tokens,) = self.tokenizer.try_encode_batch([text], self.before)
        if tokens is None and (normal := self.tokenizer.normalize(text)):
            # Text that the tokenizer would change, such as a newline that its normalizer drops.
            (tokens,) = self.tokenizer.try_encode_batch([normal], self.before)
        return tokens


if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

CONTINUES = "\0"
"""Joins a role and the special tokens that stand in front of its text; a later part of a turn has no role."""


@functools.lru_cache(maxsize=16)
def special_pattern(tokenizer: Tokenizer) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """Return what finds special tokens (in its one group), and those that are markup inside messages.

    Markup, such as `<think>`, is no special token for transformers: it reads it in messages as training does.
    """
    strings = sorted(tokenizer.control, key=len, reverse=True)
    added = tokenizer.document.get("added_tokens") or []
    ordinary = {token["content"] for token in added if not token.get("special")}
    pattern = re.compile("(" + "|".join(map(re.escape, strings)) + ")") if strings else None
    return pattern, frozenset(ordinary & tokenizer.control.keys())
