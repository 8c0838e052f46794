"""Bits per byte of student and teacher over the very same bytes.

    bits per byte = −Σ log2 p(token) / Σ bytes

over the tokens of those smallest shared chunks that both models score whole: text alone, no special
tokens, nothing that only one of the two read before its length limit. So two tokenizers can be compared,
within one setting of the lengths; documents cut elsewhere give other numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tokenkit.data.collate import AlignedCollator, Rows
from tokenkit.pairing.align import Alignment, align, chunk_spans, chunks_with
from tokenkit.parallel import World
from tokenkit.structs import Batch, Side
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.ragged import FlatTokens, joined
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.training.requests import Evaluate, WrittenRows, ask

logger = logging.getLogger(__name__)

Bools = NDArray[np.bool_]
BITS_PER_NAT = 1 / math.log(2.0)


@dataclass(frozen=True, slots=True)
class HeldoutBatch:
    """Documents whose `trained` tokens are those that count here."""

    batch: Batch
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """One measurement."""

    student: float
    teacher: float | None
    """None: there was no teacher to measure."""
    num_bytes: int


def heldout_batches(
    documents: Sequence[Document], collator: AlignedCollator, batch_size: int = 8
) -> list[HeldoutBatch]:
    """Tokenize documents once for all measurements of a run. Documents that cannot be read are left out, and
    said.

    Args:
        documents: the text.
        collator: says how it becomes tokens; what is left out here does not count there.
        batch_size: documents of a batch.

    Raises:
        ValueError: no byte of the documents is scored by both models.
    """
    collator = replace(collator)
    student = collator.student_tokenizer
    teacher = collator.teacher_tokenizer or student
    pairs = [sides for document in documents if (sides := collator.sides_of(document)) is not None]
    left_out = ", ".join(f"{count} {reason}" for reason, count in collator.skipped.items())
    if not pairs and left_out:
        raise ValueError(f"none of the {len(documents)} held-out documents can be tokenized: {left_out}")
    if left_out:
        logger.warning("of %d held-out documents some are not measured: %s", len(documents), left_out)
    pairs.sort(key=lambda pair: len(pair[0].ids_N))  # rows of one batch then need little padding
    batches = [
        heldout_batch(pairs[start : start + batch_size], student, teacher)
        for start in range(0, len(pairs), batch_size)
    ]
    batches = [batch for batch in batches if batch.num_bytes]
    if not batches:
        raise ValueError(
            f"none of the {len(documents)} held-out documents has a byte that both models score: give longer "
            "documents with ppl_eval_data, or hold out more of the data"
        )
    return batches


def heldout_batch(
    pairs: Sequence[tuple[FlatTokens, FlatTokens]], student: Tokenizer, teacher: Tokenizer
) -> HeldoutBatch:
    """Mark the tokens that count, and count their bytes."""
    sides = joined(pair[0] for pair in pairs), joined(pair[1] for pair in pairs)
    alignment = align(*sides)
    excluded = [_excluded(side, tokenizer) for side, tokenizer in zip(sides, (student, teacher), strict=True)]
    is_out_C = chunks_with(alignment, *excluded)
    start_C, end_C = chunk_spans(alignment, sides[0])
    num_bytes = int((end_C - start_C)[~is_out_C].sum())
    counted = _counted(alignment, is_out_C)
    padded = [_side(side, counted_N) for side, counted_N in zip(sides, counted, strict=True)]
    return HeldoutBatch(Batch(padded[0], padded[1], {}), num_bytes)


def _excluded(side: FlatTokens, tokenizer: Tokenizer) -> Bools:
    """Tokens that no model scores, that are no text, or that do not say which text they stand for."""
    excluded_N = side.special_N | ~side.trained_N
    excluded_N[side.offset_B[:-1][side.length_B > 0]] = True
    if tokenizer.unk_id is not None:
        excluded_N |= side.ids_N == tokenizer.unk_id
    return excluded_N


def _counted(alignment: Alignment, is_out_C: Bools) -> list[Bools]:
    table = np.append(~is_out_C, False)  # index -1, in no chunk
    return [table[alignment.student_N], table[alignment.teacher_M]]


def _side(side: FlatTokens, counted_N: Bools) -> Side:
    rows = Rows(side)
    return Side(
        ids_BT=rows.pad(side.ids_N.astype(np.int64), 0),
        length_B=torch.from_numpy(side.length_B),
        trained_BT=rows.pad(counted_N, False),
    )


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, batches: Sequence[HeldoutBatch], world: World, step: int = 0
) -> BitsPerByte:
    """Measure student and teacher of a `Distillation` on held-out batches, shared out over the ranks.

    Every rank runs as many batches as the others, the last of them with weight 0 where it has too few:
    a sharded forward is a collective.
    """
    was_training, has_teacher = model.training, getattr(model, "teacher", None) is not None
    model.eval()
    nats = torch.zeros(2, dtype=torch.float64, device=world.device)
    num_bytes = torch.zeros((), dtype=torch.float64, device=world.device)
    rows = ask(model, WrittenRows())  # once, not for every batch
    for start in range(0, len(batches), world.world_size):
        index = start + world.rank
        heldout = batches[min(index, len(batches) - 1)]
        values = ask(model, Evaluate(heldout.batch.to(world.device), rows)).double()
        if index < len(batches):
            nats += values
            num_bytes += heldout.num_bytes
    model.train(was_training)
    sums = world.all_reduce({"student": nats[0], "teacher": nats[1], "bytes": num_bytes}, step)
    total = float(sums["bytes"])
    student, teacher = (float(sums[name]) * BITS_PER_NAT / total for name in ("student", "teacher"))
    return BitsPerByte(student, teacher if has_teacher else None, int(total))
