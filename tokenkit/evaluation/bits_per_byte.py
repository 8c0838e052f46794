"""Bits per byte of student and teacher over the very same bytes.

`byte_shares` says which bytes count and what of a token's bits goes to them. Here documents are cut at the
lengths of a run, so nothing counts that only one of the two read, and batches are shared out over ranks;
`text_bits` reads whole documents, in windows. Documents cut elsewhere give other numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tokenkit.data.collate import AlignedCollator, Rows
from tokenkit.evaluation.byte_shares import Floats, shares
from tokenkit.parallel import World
from tokenkit.structs import Batch, Side
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.ragged import FlatTokens, joined
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.training.requests import Evaluate, WrittenRows, ask

logger = logging.getLogger(__name__)

BITS_PER_NAT = 1 / math.log(2.0)


@dataclass(frozen=True, slots=True)
class HeldoutBatch:
    """Documents whose `trained` tokens are those that count here."""

    batch: Batch
    shares: tuple[Tensor, Tensor]
    """float32 [B, T] and [B, S], what counts of each token of student and teacher."""
    num_bytes: int

    def to(self, device: torch.device) -> HeldoutBatch:
        """Return the same documents on a device."""
        student, teacher = (share_BT.to(device) for share_BT in self.shares)
        return HeldoutBatch(self.batch.to(device), (student, teacher), self.num_bytes)


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
    sides = [joined(documents) for documents in zip(*pairs, strict=True)]
    found = shares(sides, (student, teacher))
    padded = [_side(side, share_N) for side, share_N in zip(sides, found.share_N, strict=True)]
    (left, left_share_BT), (right, right_share_BT) = padded
    return HeldoutBatch(Batch(left, right, {}), (left_share_BT, right_share_BT), found.num_bytes)


def _side(side: FlatTokens, share_N: Floats) -> tuple[Side, Tensor]:
    rows = Rows(side)
    padded = Side(
        ids_BT=rows.pad(side.ids_N.astype(np.int64), 0),
        length_B=torch.from_numpy(side.length_B),
        trained_BT=rows.pad(share_N > 0, False),
    )
    return padded, rows.pad(share_N.astype(np.float32), 0)


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, batches: Sequence[HeldoutBatch], world: World, step: int = 0
) -> BitsPerByte:
    """Measure student and teacher of a `Distillation` on held-out batches, shared out over the ranks."""
    was_training, has_teacher = model.training, getattr(model, "teacher", None) is not None
    model.eval()
    rows = ask(model, WrittenRows())  # once, not for every batch
    student, teacher, total = summed_bits(
        lambda held: ask(model, Evaluate(held.batch, rows, held.shares)), batches, world, step
    )
    model.train(was_training)
    return BitsPerByte(student / total, teacher / total if has_teacher else None, int(total))


def summed_bits(
    nats: Callable[[HeldoutBatch], Tensor], batches: Sequence[HeldoutBatch], world: World, step: int = 0
) -> tuple[float, float, float]:
    """Return the bits of student and teacher over all batches, and the bytes that they are for.

    Every rank runs as many batches as the others, the last of them with weight 0 where it has too few:
    a sharded forward is a collective.

    Args:
        nats: of a batch on the world's device, [2], those of its tokens times what counts of each.
        batches: the same on every rank.
        world: the ranks.
        step: what the ranks name this exchange by.
    """
    sum_2 = torch.zeros(2, dtype=torch.float64, device=world.device)
    num_bytes = torch.zeros((), dtype=torch.float64, device=world.device)
    for start in range(0, len(batches), world.world_size):
        index = start + world.rank
        heldout = batches[min(index, len(batches) - 1)]
        values_2 = nats(heldout.to(world.device)).double()
        if index < len(batches):
            sum_2 += values_2
            num_bytes += heldout.num_bytes
    sums = world.all_reduce({"student": sum_2[0], "teacher": sum_2[1], "bytes": num_bytes}, step)
    student, teacher = (float(sums[name]) * BITS_PER_NAT for name in ("student", "teacher"))
    return student, teacher, float(sums["bytes"])
