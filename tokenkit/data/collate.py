"""Documents to a batch: tokenize twice, cut to length, align, pad.

An `AlignedCollator` is an ordinary `collate_fn`: give it to a `DataLoader` or a `Trainer`.

A tokenizer reads all of a text before any of it is known to be cut off. Only the first tokens are kept, so
a long document is first cut to a multiple of them. What stands behind a cut may change tokens in front of it
(a word that ends elsewhere, letters that are composed), and no rule says how far. So the document is cut
twice, the second time twice as far behind: where both give the same first tokens, the text that only one of
them saw does not matter; where they differ, more of it is read, in the end all.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenkit.data.lockstep import lay_out, packed_rows
from tokenkit.data.options import TextOptions
from tokenkit.options import check_at_least
from tokenkit.pairing.align import Alignment, PairRule, SideRules, align_kinds
from tokenkit.structs import UNPAIRED, Batch, ChunkKind, Chunks, Packed, Side
from tokenkit.tokenization.chat.documents import Document, document_from_row
from tokenkit.tokenization.chat.encode import CANNOT_SPELL, encode_flat
from tokenkit.tokenization.ragged import FlatTokens, cut, joined, split
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer
from tokenkit.tokenization.written import Unencodable, check_unencodable, writable_document

logger = logging.getLogger(__name__)

_QUOTED = re.compile(r"""\s*(?:\(?['"]|at character).*""", re.DOTALL)
_WHITESPACE = "space+tab+newline"  # what may begin a word; a special token closes a chunk by itself


@dataclass
class AlignedCollator(TextOptions):
    """Turns rows into one `Batch` of both tokenizations.

    Rows that cannot be tokenized are left out and counted in `skipped`. A tokenizer may be given as anything
    that `load_tokenizer` takes: of transformers', a path, a name.
    """

    student_tokenizer: Tokenizer
    teacher_tokenizer: Tokenizer | None = None
    """None: one tokenizer serves both sides."""
    _: KW_ONLY
    chunk_kinds: Iterable[ChunkKind] = ("unconstrained",)
    """The chunks that the losses look at: `unconstrained`, `space`, `unbiased`."""
    unbiased: PairRule | None = None
    """Which pairs of last tokens close an `unbiased` chunk; see `pairing.bias.bias.PairBiases.rule`."""
    unencodable: Unencodable = "skip"
    """What becomes of a row with characters that a tokenizer cannot write: `skip` leaves it out, `drop` and
    `replace` (by U+FFFD, or else `?`) change the text, for both sides alike."""
    pad_to_multiple_of: int = 1
    """Both lengths are padded up to a multiple of this."""
    skipped: Counter[str] = field(default_factory=Counter, init=False)
    """Rows left out so far, by reason."""
    altered: Counter[str] = field(default_factory=Counter, init=False)
    """Characters that were dropped or replaced so far, and in how many rows."""

    def __post_init__(self) -> None:
        """Check the options, and read the tokenizers' masks once.

        Raises:
            TypeError: a tokenizer of another library.
            ValueError: a length below 1, an unknown mode, or one that a tokenizer cannot write.
        """
        super().__post_init__()
        check_at_least(self, 1, "pad_to_multiple_of")
        self.student_tokenizer = load_tokenizer(self.student_tokenizer)
        if self.teacher_tokenizer is not None:
            self.teacher_tokenizer = load_tokenizer(self.teacher_tokenizer)
        tokenizers = (self.student_tokenizer, self.teacher_tokenizer or self.student_tokenizer)
        check_unencodable(self.unencodable)
        self._lengths = (self.max_length_student, self.max_length_teacher)
        student, teacher = (_rules(tokenizer, self.space_mask_mode) for tokenizer in tokenizers)
        self._rules, self._space = (student[0], teacher[0]), (student[1], teacher[1])
        self._eos = tuple(tokenizer.eos_id for tokenizer in tokenizers)
        self._meanings = tuple(tokenizer.meaning for tokenizer in tokenizers)
        self.chunk_kinds = tuple(self.chunk_kinds)
        # a mode or kind that cannot be had would spoil every row: try one
        probe = self._encode([Document(text="a")])
        self._align(probe[0], probe[-1])
        self._pads = tuple(tokenizer.pad_id or 0 for tokenizer in tokenizers)

    def __call__(self, rows: Sequence[Document | Mapping[str, Any]]) -> Batch:
        """Return the batch of some documents, or of rows that `document_from_row` reads.

        Raises:
            ValueError: if no token of the batch is trained.
        """
        batch = self.collate(rows)
        if not has_trained_token(batch):
            raise ValueError(self.nothing_trained(len(rows)))
        return batch

    def collate(self, rows: Sequence[Document | Mapping[str, Any]]) -> Batch:
        """Return the batch without asking for a trained token.

        One rank of many may well have none in a micro-batch; the count of the whole step decides there.
        """
        sides = self._tokenize(rows)
        kinds = self._align(*sides)
        student, teacher = (Rows(flat, self.pad_to_multiple_of) for flat in sides)
        packed = self._packed((student, teacher)) if self.pack_documents else (None, None)
        chunks: dict[str, Chunks] = {
            kind: Chunks(
                student.chunks(alignment.student_N, alignment.offset_B),
                teacher.chunks(alignment.teacher_M, alignment.offset_B),
            )
            for kind, alignment in kinds.items()
        }
        return Batch(self._side(0, student, packed[0]), self._side(1, teacher, packed[1]), chunks)

    def _packed(self, sides: tuple[Rows, Rows]) -> tuple[Packed, ...]:
        row_B, start_BK = lay_out(np.stack([side.length_B for side in sides], 1), self._lengths)
        return tuple(
            packed_rows(side.flat.ids_N, side.length_B, side.T, row_B, start_B, pad_id)
            for side, start_B, pad_id in zip(sides, start_BK.T, self._pads, strict=True)
        )

    def nothing_trained(self, rows: int) -> str:
        """Return the message for a batch of so many rows without a trained token."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        if self.skipped.total() >= rows > 0:
            return (
                f"none of the {rows} rows has a token to train on, since rows were left out: {reasons}; a "
                "row is a mapping with text, with messages, or with prompt and completion"
            )
        return (
            f"none of the {rows} rows has a token to train on: the answers may lie behind the first "
            f"{self.max_length_student} student tokens (max_length_new of a run, max_length_student of a "
            f"collator), or be masked (loss_mask_mode={self.loss_mask_mode!r}); "
            f"rows left out so far: {reasons or 'none'}"
        )

    def _tokenize(self, rows: Sequence[Document | Mapping[str, Any]]) -> tuple[FlatTokens, FlatTokens]:
        documents = []
        for row in rows:
            try:
                documents.append(row if isinstance(row, Document) else document_from_row(row))
            except ValueError as error:
                self._skip(error)
        sides = self._encode_readable([self._beginning(document) for document in documents])
        return cut(sides[0], self._lengths[0]), cut(sides[-1], self._lengths[1])

    def _encode_readable(self, documents: list[Document]) -> tuple[FlatTokens, ...]:
        """Encode documents without those that cannot be."""
        if documents:
            try:
                return self._encode(documents)
            except ValueError:  # one document spoils the whole call: find it
                pass
        encoded = [sides for document in documents if (sides := self._alone(document)) is not None]
        if not encoded:  # a batch needs a row to run the model on, and that row asks for nothing
            encoded = [tuple(map(_untrained, self._pads))]
        return tuple(map(joined, zip(*encoded, strict=True)))

    def tokens_of(self, documents: Sequence[Document]) -> FlatTokens:
        """Return the student's tokens of some documents, all of them; what cannot be read is left out."""
        return self._encode_readable(list(documents))[0]

    def sides_of(self, document: Document) -> tuple[FlatTokens, FlatTokens] | None:
        """Return both tokenizations of one document, cut to length; None: it is left out and counted."""
        sides = self._alone(self._beginning(document))
        return None if sides is None else (cut(sides[0], self._lengths[0]), cut(sides[-1], self._lengths[1]))

    def _alone(self, document: Document) -> tuple[FlatTokens, ...] | None:
        try:
            return self._encode([document])
        except ValueError as error:
            mended = self._mended(document)
            if mended is None:
                self._skip(error)
            return mended

    def _beginning(self, document: Document) -> Document:
        """Return a document of which no more has to be read than is kept."""
        both = self._lengths if self.teacher_tokenizer is not None else (max(self._lengths),)
        return beginning(document, both, self._encode)

    def _mended(self, document: Document) -> tuple[FlatTokens, ...] | None:
        """Encode a document without the characters that a tokenizer cannot write; None: it stays out."""
        if self.unencodable == "skip":
            return None
        try:
            mended, number = writable_document(document, self._tokenizers, self.unencodable)
            encoded = self._encode([self._beginning(mended)])
        except ValueError:
            return None
        if not self.altered:
            logger.warning("a row has characters that a tokenizer cannot write: %s", self.unencodable)
        self.altered.update({"characters": number, "rows": 1})
        return encoded

    def _skip(self, error: ValueError) -> None:
        reason = _reason(error)
        self.skipped[reason] += 1
        if self.skipped[reason] == 1:
            way_out = "; data.bad_rows.unencodable can keep such rows" if CANNOT_SPELL in reason else ""
            logger.warning("a row is left out: %s%s; more such rows are only counted", reason, way_out)

    @property
    def _tokenizers(self) -> tuple[Tokenizer, ...]:
        if self.teacher_tokenizer is None:
            return (self.student_tokenizer,)
        return self.student_tokenizer, self.teacher_tokenizer

    def _encode(self, documents: list[Document]) -> tuple[FlatTokens, ...]:
        return encode_flat(
            documents,
            self._tokenizers,
            mode=self.chat_template_mode,
            loss_mask_mode=self.loss_mask_mode,
            use_chat_template=self.use_chat_template,
        )

    def _align(self, student: FlatTokens, teacher: FlatTokens) -> dict[ChunkKind, Alignment]:
        return align_kinds(
            student, teacher, self.chunk_kinds, *self._rules, self.special_tokens_mode, self.unbiased
        )

    def _side(self, number: int, rows: Rows, packed: Packed | None) -> Side:
        return Side(
            ids_BT=rows.pad(rows.flat.ids_N.astype(np.int64), self._pads[number]),
            length_B=torch.from_numpy(rows.length_B),
            trained_BT=rows.pad(rows.flat.trained_N, False),
            space_V=self._space[number],
            eos_id=self._eos[number],
            ids_mean=self._meanings[number],
            packed=packed,
        )


class Rows:
    """Lays the flat tokens of one side out as [B, T], padded on the right to a multiple of some length."""

    def __init__(self, flat: FlatTokens, multiple: int = 1) -> None:
        self.flat, self.length_B = flat, flat.length_B
        self.T = -(-int(self.length_B.max(initial=1)) // multiple) * multiple
        self._filled_BT = np.arange(self.T) < self.length_B[:, None]

    def pad(self, value_N: NDArray[Any], fill: int) -> Tensor:
        """Return a value of each token as [B, T]."""
        result_BT = np.full(self._filled_BT.shape, fill, value_N.dtype)
        result_BT[self._filled_BT] = value_N
        return torch.from_numpy(result_BT)

    def chunks(self, chunk_N: NDArray[np.int32], offset_B: NDArray[np.int64]) -> Tensor:
        """Pad chunk ids, counted from the first chunk of their own row."""
        first_N = np.repeat(offset_B[:-1].astype(np.int32), self.length_B)
        return self.pad(np.maximum(chunk_N - first_N, -1), -1)  # what is in no chunk stays below


def _rules(tokenizer: Tokenizer, space_mask_mode: str) -> tuple[SideRules, Tensor]:
    """Return what aligning reads of a tokenizer, and which of its tokens count as "a word ends here"."""
    # a token that has another meaning besides (EOS, mostly) is no padding where a template wrote it
    meant = {token_id for role, token_id in tokenizer.special_ids.items() if role != "pad"}
    pad_id = None if tokenizer.pad_id in meant else tokenizer.pad_id
    rules = SideRules(tokenizer.space_mask(_WHITESPACE), tokenizer.unk_id, pad_id)
    return rules, torch.tensor(tokenizer.space_mask(space_mask_mode))


def has_trained_token(batch: Batch) -> bool:
    """Whether the student is asked for any token; nothing predicts the first of a document."""
    return bool(batch.student.trained_BT[:, 1:].any())


def _reason(error: ValueError) -> str:
    """Return what went wrong without the text it went wrong on: equal reasons are counted together."""
    return _QUOTED.sub("…", str(error).split(":")[0])


def _untrained(token_id: int) -> FlatTokens:
    one = np.ones(1, np.bool_)
    return FlatTokens(
        np.array([token_id], np.int32), np.array([UNPAIRED], np.int64), one, ~one, np.array([0, 1])
    )


CHARACTERS = 16  # of the first cut, for each token that is wanted: 3 to 5 are usual
_LEAST = 2048  # characters of the first cut
_WORTH = 4  # times the first cut: a shorter document is read whole

Encode = Callable[[list[Document]], Sequence[FlatTokens]]


def beginning(document: Document, lengths: Sequence[int], encode: Encode) -> Document:
    """Return a document with the same first tokens, of which less has to be read.

    Args:
        document: of any length.
        lengths: tokens that are kept of each side.
        encode: gives the sides of some documents.
    """
    size = max(_LEAST, CHARACTERS * max(lengths))
    total = size_of(document)
    while _WORTH * size <= total:
        try:
            longer = _cut(document, 2 * size)
            if _begin_alike(encode([_cut(document, size), longer]), lengths):
                return longer
        except ValueError:  # nothing but whitespace, or text that cannot be written: all of it decides
            return document
        size *= 4
    return document


def _begin_alike(sides: Sequence[FlatTokens], lengths: Sequence[int]) -> bool:
    for side, length in zip(sides, lengths, strict=True):
        first, second = split(side)
        if min(len(first.ids), len(second.ids)) <= length:
            return False
        for name in ("ids", "byte_ends", "special", "trained"):
            if not np.array_equal(getattr(first, name)[:length], getattr(second, name)[:length]):
                return False
    return True


def size_of(document: Document) -> int:
    """Return the characters of a document."""
    if document.text is not None:
        return len(document.text)
    return sum(len(message.content) for message in document.messages or ())


def _cut(document: Document, size: int) -> Document:
    """Keep so many characters, and of each later message a few: what stands around them stays."""
    if document.text is not None:
        return replace(document, text=document.text[:size])
    messages, left = [], size
    for message in document.messages or ():
        messages.append(replace(message, content=message.content[: max(left, 1)]))
        left = max(left - len(message.content), 0)
    return replace(document, messages=tuple(messages))
