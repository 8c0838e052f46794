"""Cut two tokenizations of the same text at every boundary that both share.

    text       t h e   c a t s
    student    [the ][cats]                 ends 4, 8
    teacher    [the][ ][cat][s]             ends 3, 4, 7, 8
    shared           ^        ^             4, 8   ->   chunk 0 "the ", chunk 1 "cats"

A chunk is the smallest stretch of text at whose both ends both tokenizations have a token boundary. It
holds the tokens that end inside it; a token of no width belongs to the chunk of the token after it. In
no chunk (-1) are tokens without a partner and those behind the last shared boundary, which is also
what truncation of either side leaves.

All documents of a batch lie on one axis, end to end. Each side marks its ends on it; a boundary is
shared where a token ends on the other side's mark, and a token's chunk is the number of shared
boundaries before it. Memory is linear in tokens and bytes.

Dimensions: B documents, N student tokens, M teacher tokens, C chunks, V and W the two vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenkit.structs import ChunkKind, Tokens
from tokenkit.tokenization.options import SpecialTokensMode
from tokenkit.tokenization.ragged import Bools, FlatTokens, Ints, flatten

ChunkIds = NDArray[np.int32]
PairRule = Callable[[ChunkIds, ChunkIds], Bools]
"""(teacher ids [C], student ids [C]) -> bool [C]: whether this pair of last tokens closes a chunk."""


class Alignment(NamedTuple):
    """The chunk of every token of a batch. Ids count over the whole batch, so each names one chunk."""

    student_N: ChunkIds
    teacher_M: ChunkIds
    student_last_C: Ints
    """Index into the flat student tokens of each chunk's last token."""
    teacher_last_C: Ints
    offset_B: Ints
    """[B + 1] document b has the chunks offset[b] to offset[b + 1], end exclusive."""


@dataclass(frozen=True, slots=True)
class SideRules:
    """What the chunks have to know about one tokenizer."""

    space_V: Bools
    """The token's first byte is a space, a tab or a newline; never a special token."""
    unk_id: int | None = None
    pad_id: int | None = None


def align_batch(student: Sequence[Tokens], teacher: Sequence[Tokens]) -> Alignment:
    """Return the smallest chunks of each document's two tokenizations; `align` says how."""
    return align(flatten(student), flatten(teacher))


def align(student: FlatTokens, teacher: FlatTokens) -> Alignment:
    """Return the smallest chunks of the same documents in two tokenizations.

    Args:
        student: tokens whose `byte_ends` lie on the axis that both sides share.
        teacher: the same documents, in the same order.

    Raises:
        ValueError: if the sides hold different numbers of documents, or byte ends that fall.
    """
    if len(student.offset_B) != len(teacher.offset_B):
        raise ValueError(
            "both sides must hold the same documents: "
            f"got {len(student.offset_B) - 1} of the student and {len(teacher.offset_B) - 1} of the teacher"
        )
    width_B = np.maximum(_axis_length(student), _axis_length(teacher)) + 1
    start_B = np.zeros(len(width_B) + 1, np.int64)
    np.cumsum(width_B, out=start_B[1:])
    student_end_N = _on_batch_axis(student, start_B, "student")
    teacher_end_M = _on_batch_axis(teacher, start_B, "teacher")
    student_shared_N = _has_width(student_end_N) & _marks(teacher_end_M, start_B)[student_end_N]
    teacher_shared_M = _has_width(teacher_end_M) & _marks(student_end_N, start_B)[teacher_end_M]
    student_N, offset_B = _chunk_ids(student, student_shared_N)
    teacher_M, teacher_offset_B = _chunk_ids(teacher, teacher_shared_M)
    assert np.array_equal(offset_B, teacher_offset_B)
    return Alignment(
        student_N, teacher_M, np.flatnonzero(student_shared_N), np.flatnonzero(teacher_shared_M), offset_B
    )


def _axis_length(side: FlatTokens) -> Ints:
    """Return the last position of each document."""
    result_B = np.zeros(len(side.offset_B) - 1, np.int64)
    filled_B = side.length_B > 0  # reduceat returns the next document's value for an empty one
    if filled_B.any():
        result_B[filled_B] = np.maximum.reduceat(side.byte_ends_N, side.offset_B[:-1][filled_B])
    return np.maximum(result_B, 0)


def _on_batch_axis(side: FlatTokens, start_B: Ints, name: str) -> Ints:
    """Return the end of each token on the axis of the batch; an unpaired token ends where it starts."""
    end_N = side.byte_ends_N + np.repeat(start_B[:-1], side.length_B)
    unpaired_N = side.byte_ends_N < 0
    if unpaired_N.any():
        end_N[unpaired_N] = 0
        falls = np.flatnonzero((side.byte_ends_N >= 0) & (end_N < np.maximum.accumulate(end_N)))
        np.maximum.accumulate(end_N, out=end_N)
    else:
        falls = np.flatnonzero(end_N[1:] < end_N[:-1]) + 1
    if len(falls):
        document = np.searchsorted(side.offset_B, falls[0], side="right") - 1
        raise ValueError(
            f"byte_ends must not fall within a document: those of the {name} do in document {document} "
            f"at token {falls[0] - side.offset_B[document]}"
        )
    return end_N


def _has_width(end_N: Ints) -> Bools:
    """Whether a token ends past the token before it (the first of a document always does)."""
    result_N = np.ones(len(end_N), np.bool_)
    np.greater(end_N[1:], end_N[:-1], out=result_N[1:])
    return result_N


def _marks(end_N: Ints, start_B: Ints) -> Bools:
    """Return the axis with every end marked. Where a document starts no chunk can end."""
    marks = np.zeros(start_B[-1] + 1, np.bool_)
    marks[end_N] = True
    marks[start_B] = False
    return marks


def _chunk_ids(side: FlatTokens, shared_N: Bools) -> tuple[ChunkIds, Ints]:
    """Return each token's chunk and the first chunk of each document [B + 1]."""
    closed_N = np.zeros(len(shared_N) + 1, np.int32)
    np.cumsum(shared_N, out=closed_N[1:])
    offset_B = closed_N[side.offset_B].astype(np.int64)
    chunk_N = closed_N[:-1]
    in_tail_N = chunk_N >= np.repeat(offset_B[1:], side.length_B)
    return np.where(in_tail_N | (side.byte_ends_N < 0), np.int32(-1), chunk_N), offset_B


def chunks_with(alignment: Alignment, student_N: Bools, teacher_M: Bools) -> Bools:
    """Return for each chunk [C] whether one of its tokens is among those marked on either side."""
    result_C = np.zeros(len(alignment.student_last_C) + 1, np.bool_)
    result_C[alignment.student_N[student_N]] = True
    result_C[alignment.teacher_M[teacher_M]] = True
    return result_C[:-1]  # the last entry took the tokens in no chunk, whose id is -1


def drop_chunks(alignment: Alignment, drop_C: Bools) -> Alignment:
    """Take the tokens of some chunks out of all chunks. The other chunks keep their ids."""
    new_id_C = np.where(drop_C, np.int32(-1), np.arange(len(drop_C), dtype=np.int32))
    return _renumbered(alignment, new_id_C)


def join_chunks(alignment: Alignment, closes_C: Bools) -> Alignment:
    """Join neighbouring chunks until one closes.

    Args:
        alignment: chunks to join.
        closes_C: whether a joined chunk ends at the end of this chunk. The last chunk of a document
            closes in any case: what never closed is one open chunk.
    """
    closes_C = closes_C.copy()
    has_chunks_B = np.diff(alignment.offset_B) > 0
    closes_C[alignment.offset_B[1:][has_chunks_B] - 1] = True
    closed_C = np.zeros(len(closes_C) + 1, np.int32)
    np.cumsum(closes_C, out=closed_C[1:])
    return _renumbered(alignment, closed_C[:-1])._replace(
        student_last_C=alignment.student_last_C[closes_C],
        teacher_last_C=alignment.teacher_last_C[closes_C],
        offset_B=closed_C[alignment.offset_B].astype(np.int64),
    )


def _renumbered(alignment: Alignment, new_id_C: ChunkIds) -> Alignment:
    table = np.append(new_id_C, np.int32(-1))  # index -1, in no chunk, stays -1
    return alignment._replace(
        student_N=table[alignment.student_N],
        teacher_M=table[alignment.teacher_M],
    )


def before_whitespace(
    alignment: Alignment, student: FlatTokens, teacher: FlatTokens, space_V: Bools, space_W: Bools
) -> Bools:
    """Return for each chunk [C] whether both sides' next token in its document begins with whitespace."""
    student_next_C = _next_begins_with(student, alignment.student_last_C, space_V)
    return student_next_C & _next_begins_with(teacher, alignment.teacher_last_C, space_W)


def _next_begins_with(side: FlatTokens, last_C: Ints, space_V: Bools) -> Bools:
    follows_N = np.zeros(len(side.ids_N), np.bool_)
    follows_N[:-1] = space_V[side.ids_N[1:]]
    follows_N[side.offset_B[1:][side.length_B > 0] - 1] = False  # the next document is not the next token
    return follows_N[last_C]


def align_kinds(
    student: FlatTokens,
    teacher: FlatTokens,
    kinds: Iterable[ChunkKind],
    student_rules: SideRules,
    teacher_rules: SideRules,
    special_tokens_mode: SpecialTokensMode = "identity",
    unbiased: PairRule | None = None,
) -> dict[ChunkKind, Alignment]:
    """Return the chunks of every kind that the losses ask for.

    A chunk with an unknown token on either side is dropped: that token does not say which text it stands for.

    Args:
        student: the batch, student side.
        teacher: the same documents, teacher side.
        kinds: `unconstrained`, the smallest chunks; `space`, joined until the next token on both sides
            begins with whitespace or the chunk ends in a special token; `unbiased`, joined until `unbiased`
            says so of the last tokens, or the chunk ends in a special token.
        student_rules: of the student's tokenizer.
        teacher_rules: of the teacher's tokenizer.
        special_tokens_mode: `identity` keeps paired special tokens as chunks; `ignore` drops them;
            `ignore_pad` drops only padding tokens that a template wrote.
        unbiased: which pairs of last tokens close an `unbiased` chunk; `pairing.bias.bias.PairBiases.rule`.

    Raises:
        ValueError: if a kind is unknown, or `unbiased` chunks are asked for without their rule.
    """
    smallest = align(student, teacher)
    ignored = (
        _ignored(student, student_rules, special_tokens_mode),
        _ignored(teacher, teacher_rules, special_tokens_mode),
    )
    unusable_N = ignored[0] | _unknown(student, student_rules)
    unusable_M = ignored[1] | _unknown(teacher, teacher_rules)
    result: dict[ChunkKind, Alignment] = {}
    for kind in kinds:
        if kind == "unconstrained":
            chunks = smallest
        else:
            closes_C = _closes(kind, smallest, (student, teacher), (student_rules, teacher_rules), unbiased)
            closes_C |= student.special_N[smallest.student_last_C]
            closes_C |= teacher.special_N[smallest.teacher_last_C]
            # dropping a special token must not take the word before it along
            closes_C[:-1] |= chunks_with(smallest, *ignored)[1:]
            chunks = join_chunks(smallest, closes_C)
        drop_C = chunks_with(chunks, unusable_N, unusable_M)
        result[kind] = drop_chunks(chunks, drop_C) if drop_C.any() else chunks
    return result


def _closes(
    kind: ChunkKind,
    smallest: Alignment,
    sides: tuple[FlatTokens, FlatTokens],
    rules: tuple[SideRules, SideRules],
    unbiased: PairRule | None,
) -> Bools:
    """Return for each of the smallest chunks [C] whether a chunk of this kind may end there."""
    student, teacher = sides
    if kind == "space":
        return before_whitespace(smallest, student, teacher, rules[0].space_V, rules[1].space_V)
    if kind != "unbiased":
        raise ValueError(f"chunk kind must be unconstrained, space or unbiased: got {kind!r}")
    if unbiased is None:
        raise ValueError(
            "'unbiased' chunks need the statistics of the tokenizer pair: make them with `tokenkit "
            "pair-stats` and name their folder (tokenizer_pair_data_path; of a collator, unbiased)"
        )
    return unbiased(teacher.ids_N[smallest.teacher_last_C], student.ids_N[smallest.student_last_C])


def _unknown(side: FlatTokens, rules: SideRules) -> Bools:
    if rules.unk_id is None:
        return np.zeros(len(side.ids_N), np.bool_)
    return side.ids_N == rules.unk_id


def _ignored(side: FlatTokens, rules: SideRules, mode: SpecialTokensMode) -> Bools:
    if mode == "ignore":
        return side.special_N
    if mode == "ignore_pad" and rules.pad_id is not None:
        return side.special_N & (side.ids_N == rules.pad_id)
    if mode in ("identity", "ignore_pad"):
        return np.zeros(len(side.ids_N), np.bool_)
    raise ValueError(f"special_tokens_mode must be identity, ignore or ignore_pad: got {mode!r}")


def token_spans(side: FlatTokens) -> tuple[Ints, Ints]:
    """Return where each token starts and ends on its own document's axis; both -1 for an unpaired token."""
    start_B = np.arange(len(side.offset_B), dtype=np.int64) * (_axis_length(side).max(initial=0) + 1)
    end_N = _on_batch_axis(side, start_B, "given side")
    before_N = np.append(0, end_N[:-1])
    document_start_N = np.repeat(start_B[:-1], side.length_B)
    start_N = np.maximum(before_N, document_start_N)
    unpaired_N = side.byte_ends_N < 0
    span_start_N = np.where(unpaired_N, -1, start_N - document_start_N)
    return span_start_N, np.where(unpaired_N, -1, end_N - document_start_N)


def chunk_spans(alignment: Alignment, student: FlatTokens) -> tuple[Ints, Ints]:
    """Return where each chunk [C] starts and ends on its own document's axis."""
    end_C = student.byte_ends_N[alignment.student_last_C]
    start_C = np.append(0, end_C[:-1])
    start_C[alignment.offset_B[:-1][np.diff(alignment.offset_B) > 0]] = 0
    return start_C, end_C
