"""One data set as an endless sequence of documents whose order is a pure function of seed and epoch.

A data set held in memory is permuted as a whole; a stream is permuted inside consecutive blocks. Held-out
documents are chosen by a hash of their position in the data set, so they stay the same whatever the
seed, the mix and the number of processes.

A row becomes a document by the fields that the user named, or by its own shape.
"""

from __future__ import annotations

import itertools
import logging
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenkit.data.files import BadRow, Row
from tokenkit.data.options import BadRowOptions, HeldoutOptions, SourceOptions
from tokenkit.data.places import place_of
from tokenkit.tokenization.chat.documents import KNOWN_FIELDS, Document, document_from_row

logger = logging.getLogger(__name__)

_MAX_HELDOUT_SEARCH = 1_000_000  # rows
_FREE_SKIPS = 10  # the quota is a share, which means nothing for the first few rows


def hash64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each number (SplitMix64, Steele et al. 2014); equal everywhere and for ever."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def is_heldout(index: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Return which positions of a data set are held out; the first is, so that no data set has none."""
    if fraction == 0:
        return np.zeros(len(index), np.bool_)
    return (hash64(index.astype(np.uint64)) < np.uint64(fraction * 2.0**64)) | (index == 0)


class Source:
    """The documents of one data set, shuffled anew in every epoch.

    Args:
        options: where the data is and which fields hold the text.
        heldout: how much of it is never trained on.
        bad_rows: what happens to rows that are no documents.
        seed: with the epoch it decides the order.
        block_size: rows of a stream that are shuffled together.

    Raises:
        FileNotFoundError: if the path or the data set does not exist.
        ValueError: if there is no row, or the first row lacks the fields asked for.
    """

    def __init__(
        self,
        options: SourceOptions,
        *,
        heldout: HeldoutOptions,
        bad_rows: BadRowOptions,
        seed: tuple[int, ...],
        block_size: int,
    ) -> None:
        self.name = options.name or options.location
        self.epoch = 0
        self.position = 0
        self.read = 0
        self.skipped: Counter[str] = Counter()
        self._options, self._heldout, self._bad_rows = options, heldout, bad_rows
        self._seed, self._block_size = seed, block_size
        self._place = place_of(options, bad_rows)
        self._table: Sequence[Row | BadRow] | None = None
        if not options.streaming:
            rows = self._place.rows(0)
            # a hub's data set is a table on disk; a local file is read into memory here
            self._table = list(rows) if isinstance(rows, Iterator) else rows
        self._check_first_row()
        self._rows: Iterator[tuple[int, Row | BadRow | None]] | None = None
        self._found_in_epoch = False

    def _check_first_row(self) -> None:
        first = next(iter(self._table if self._table is not None else self._place.rows(0)), None)
        if first is None:
            raise ValueError(f"data set {self.name} is empty: it has no row")
        if len(self) == 1 and self._heldout.fraction > 0:
            raise ValueError(
                f"data set {self.name} has one document, and that is held out: add documents, "
                "or set data.heldout.fraction to 0"
            )
        if not isinstance(first, BadRow):
            check_fields(first, self._options, self.name)

    def __len__(self) -> int:
        """Rows, held out or not; 0 if the data set is a stream."""
        return 0 if self._table is None else len(self._table)

    def __next__(self) -> Document:
        """Return the next document to train on.

        Raises:
            ValueError: if a whole epoch holds none, or more rows are bad than the quota allows.
        """
        while True:
            if self._rows is None:
                self._rows = self._order()
            for number, row in self._rows:
                self.position += 1
                if row is None:
                    continue
                document = self._document(row, number)
                if document is not None:
                    self._found_in_epoch = True
                    return document
            if not self._found_in_epoch:
                skips = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
                raise ValueError(
                    f"data set {self.name} has no document to train on: "
                    f"{skips or 'every row is held out (data.heldout.fraction)'}"
                )
            self.epoch, self.position, self._rows, self._found_in_epoch = self.epoch + 1, 0, None, False

    def _document(self, row: Row | BadRow, number: int) -> Document | None:
        self.read += 1
        try:
            return document_of(row, self._options, self._bad_rows.max_row_bytes)
        except ValueError as error:
            reason = str(error)
        place = (row.place if isinstance(row, BadRow) else "") or f"row {number + 1}"
        if self._bad_rows.action == "raise":
            raise ValueError(
                f"data set {self.name}: row is {reason} ({place}; data.bad_rows.action is 'raise')"
            )
        self.skipped[reason] += 1
        if self.skipped[reason] == 1:
            logger.warning(
                "data set %s: a row is left out: %s (%s); more such rows are only counted",
                self.name, reason, place,
            )  # fmt: skip
        skips = self.skipped.total()
        if skips > _FREE_SKIPS and skips > self._bad_rows.quota * self.read:
            counts = ", ".join(f"{count} {name}" for name, count in self.skipped.most_common())
            raise ValueError(
                f"data set {self.name}: {skips} of {self.read} rows are no documents ({counts}), more than "
                f"the share of {self._bad_rows.quota} that may be skipped: mend the data, or raise "
                "data.bad_rows.quota"
            )
        return None

    def _order(self) -> Iterator[tuple[int, Row | BadRow | None]]:
        """Yield number and row of the rest of this epoch in its order; None stands for a held-out row."""
        fraction = self._heldout.fraction
        if self._table is not None:
            index = np.arange(len(self._table))
            index = index[~is_heldout(index, fraction)]
            for i in self._generator(0).permutation(index)[self.position :].tolist():
                yield i, self._table[i]
            return
        number, inside = divmod(self.position, self._block_size)
        rows = iter(self._place.rows(number * self._block_size))
        for block in itertools.count(number):
            members = list(itertools.islice(rows, self._block_size))
            if not members:
                return
            out = is_heldout(np.arange(len(members)) + block * self._block_size, fraction)
            order = self._generator(block).permutation(len(members)).tolist()
            for i in order[inside:]:
                yield block * self._block_size + i, None if out[i] else members[i]
            inside = 0

    def _generator(self, block: int) -> np.random.Generator:
        return np.random.default_rng((*self._seed, self.epoch, block))

    def documents(self, limit: int | None = None) -> list[Document]:
        """Return all documents, or the first ones, in the order of the data set.

        Raises:
            ValueError: if a row is no document and `action` is `raise`, or there is no document.
        """
        rows = self._table if self._table is not None else self._place.rows(0)
        result = list(itertools.islice(filter(None, map(self._document, rows, itertools.count())), limit))
        if not result:
            raise ValueError(f"data set {self.name} has no document")
        return result

    def heldout(self, count: int) -> list[Document]:
        """Return the first held-out documents, in the order of the data set.

        A stream is read until they are found, at most twice the rows that should hold so many, and never
        more than a million.
        """
        fraction = self._heldout.fraction
        if fraction == 0 or count == 0:
            return []
        rows: Iterable[Row | BadRow] = self._place.rows(0) if self._table is None else self._table
        limit = len(self) or min(int(2 * count / fraction) + 1, _MAX_HELDOUT_SEARCH)
        numbers = np.flatnonzero(is_heldout(np.arange(limit), fraction)).tolist()
        chosen = itertools.compress(rows, is_heldout(np.arange(limit), fraction).tolist())
        return list(itertools.islice(filter(None, map(self._document, chosen, numbers)), count))

    def state_dict(self) -> dict[str, Any]:
        """Return how far this data set has been read."""
        return {
            "rows": len(self),
            "data": self._place.fingerprint(),
            "epoch": self.epoch,
            "position": self.position,
            "read": self.read,
            "found": self._found_in_epoch,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: if the data is not what it was then.
        """
        if state["rows"] != len(self):
            raise ValueError(
                f"data set {self.name} has {len(self)} rows, but {state['rows']} when the state was saved: "
                "restore the data, or start a new run"
            )
        then, now = state.get("data"), self._place.fingerprint()
        if then != now:
            raise ValueError(
                f"data set {self.name} is not what it was when the state was saved ({_described(then)} then, "
                f"{_described(now)} now): restore the data, or start a new run"
            )
        for name in ("epoch", "position", "read"):
            check_count(name, state[name])
        self.epoch, self.position, self.read = state["epoch"], state["position"], state["read"]
        self._found_in_epoch = state["found"]
        self.skipped = Counter(state["skipped"])
        self._rows = None


def check_count(name: str, value: object) -> None:
    """Refuse what cannot be a number of rows or passes.

    Raises:
        ValueError: it is no whole number, or negative.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(
            f"the position in the data that was saved must be a whole number, and its {name} is "
            f"{value!r:.50}: the checkpoint was changed by hand; use another one"
        )


def _described(fingerprint: object) -> str:
    if not isinstance(fingerprint, Mapping):
        return "unknown"
    parts = [f"{fingerprint[unit]} {unit}" for unit in ("files", "bytes", "rows") if unit in fingerprint]
    return ", ".join([*parts, f"SHA-256 {str(fingerprint.get('digest'))[:12]}"])


def check_fields(first: Row, options: SourceOptions, name: str) -> None:
    """Refuse a data set whose first row lacks the fields that hold the text.

    Raises:
        ValueError: with the fields that it has.
    """
    wanted = _fields(options)
    if set(wanted) <= set(first) if wanted else set(KNOWN_FIELDS) & set(first):
        return
    expected = (
        "the field " + " and ".join(map(repr, wanted)) if wanted else f"one of {', '.join(KNOWN_FIELDS)}"
    )
    raise ValueError(
        f"data set {name}: expected rows with {expected}, but the first row has "
        f"{', '.join(map(str, first)) or 'no field'}: name the field with text_field or text_template"
    )


def _fields(options: SourceOptions) -> tuple[str, ...]:
    """Return the fields that a user named; none: the row's own shape decides."""
    if options.text_field is not None:
        return (options.text_field,)
    return tuple(name for _, name in _template(options.text_template or "") if name is not None)


def _template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, field name).

    Raises:
        ValueError: if a field is anything but a name: no positions, attributes, indices or formats.
    """
    parts = []
    for literal, name, format_spec, conversion in string.Formatter().parse(template):
        if name is not None and (not name.isidentifier() or format_spec or conversion):
            raise ValueError(
                "text_template may hold {name} of a field, and {{ for a brace: "
                f"got {name!r} in {template!r}"
            )
        parts.append((literal, name))
    return parts


def document_of(row: Row | BadRow, options: SourceOptions, max_bytes: int) -> Document:
    """Return the document of a row.

    Raises:
        ValueError: with a short reason, if it is none.
    """
    if isinstance(row, BadRow):
        raise ValueError(row.reason)
    if options.text_field is not None:
        value = _field(row, options.text_field)
        is_chat = isinstance(value, list)
        document = document_from_row({**row, "messages": value} if is_chat else {"text": value})
    elif options.text_template is not None:
        text = "".join(
            literal + ("" if name is None else _as_text(_field(row, name), name))
            for literal, name in _template(options.text_template)
        )
        document = document_from_row({"text": text})
    else:
        document = document_from_row(row)
    for text in (*document.says, document.tools or ""):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ValueError("not UTF-8") from None
        if size > max_bytes:
            raise ValueError("too long")
    return document


def _field(row: Row, name: str) -> object:
    if name not in row:
        raise ValueError(f"without the field {name!r}")
    return row[name]


def _as_text(value: object, name: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"without text in the field {name!r}")
