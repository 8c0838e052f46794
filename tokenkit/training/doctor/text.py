"""The data before a run: a sample of it, read, tokenized and aligned as the training does it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenkit.config import TrainConfig
from tokenkit.data.collate import AlignedCollator
from tokenkit.data.mix import Mix
from tokenkit.structs import Side
from tokenkit.tokenization.chat.documents import Document
from tokenkit.training.doctor.findings import Findings, many

CUT_MUCH = 0.2
"""Of the documents: more that lose their end are worth a word."""
PADDED_MUCH = 0.25
"""Of the positions: more that are padding are worth a word."""


@dataclass
class _Counts:
    documents: int = 0
    untrained: int = 0
    trained: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    positions: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    in_chunks: Counter[str] = field(default_factory=Counter)


def check_data(
    mix: Mix,
    collator: AlignedCollator,
    config: TrainConfig,
    number: int,
    found: Findings,
    *,
    has_teacher: bool,
) -> None:
    """Look at the first documents that the training will see.

    Args:
        mix: the documents, unread.
        collator: as the training's.
        config: of the training.
        number: how many are looked at.
        found: is filled.
        has_teacher: something reads its tokens.

    Raises:
        ValueError: `mix.Mix.__next__` says when.
    """
    documents = _first(mix, number)
    schedule = config.schedule
    counts = _count(documents, collator, schedule.batch_size // schedule.gradient_accumulation_steps, config)
    for reason, rows in (mix.skipped + collator.skipped).most_common():
        found.warning(
            "data", f"{rows:,} rows of the sample are left out: {reason}", "mend them; a run counts them too"
        )
    if collator.altered:
        found.warning(
            "data", f"characters that a tokenizer cannot write are changed: {dict(collator.altered)}"
        )
    if not counts.documents:
        found.error(
            "data", f"none of the {len(documents):,} documents of the sample can be tokenized", code=65
        )
        return
    _say_trained(counts, collator, found)
    _say_lengths(counts, config, ("student", "teacher") if has_teacher else ("student",), found)


def _first(mix: Mix, number: int) -> list[Document]:
    """Return the documents of one pass at most."""
    documents = []
    for document in itertools.islice(mix, number):
        if mix.epoch:
            break
        documents.append(document)
    return documents


def _count(documents: list[Document], collator: AlignedCollator, size: int, config: TrainConfig) -> _Counts:
    counts = _Counts()
    lengths = {"student": config.text.max_length_student, "teacher": config.text.max_length_teacher}
    for start in range(0, len(documents), size):
        before = collator.skipped.total()
        rows = documents[start : start + size]
        batch = collator.collate(rows)
        if collator.skipped.total() - before == len(rows):
            continue  # the row that stands for them is none
        trained_B = batch.student.trained_BT[:, 1:].sum(1)
        counts.documents += len(trained_B)
        counts.untrained += int((trained_B == 0).sum())
        counts.trained += int(trained_B.sum())
        for name, side in (("student", batch.student), ("teacher", batch.teacher)):
            _count_side(counts, name, side, lengths[name])
        for kind, chunks in batch.chunks.items():
            is_in_BT = (chunks.student_BT >= 0) & batch.student.trained_BT
            counts.in_chunks[kind] += int(is_in_BT[:, 1:].sum())
    return counts


def _count_side(counts: _Counts, name: str, side: Side, length: int) -> None:
    counts.tokens[name] += int(side.length_B.sum())
    counts.positions[name] += side.ids_BT.numel()
    counts.cut[name] += int((side.length_B >= length).sum())


def _say_trained(counts: _Counts, collator: AlignedCollator, found: Findings) -> None:
    if not counts.trained:
        found.error("data", collator.nothing_trained(counts.documents), code=65)
        return
    if counts.untrained:
        found.warning(
            "data",
            f"{counts.untrained:,} of {counts.documents:,} documents have no token to train on: their "
            "answers lie behind max_length_new, or are masked (loss_mask_mode)",
            "raise max_length_new, or leave them out of the data",
        )
    documents, total = many(counts.documents, "document"), counts.tokens["student"]
    found.note(
        "data",
        f"{documents}: {counts.trained / total:.0%} of the student's {total:,} tokens "
        f"are trained; the teacher has {counts.tokens['teacher']:,}",
    )
    for kind, number in counts.in_chunks.items():
        share = number / counts.trained
        add = found.warning if share < 1 / 2 else found.note
        add(
            "data",
            f"{share:.0%} of the trained tokens lie in chunks ({kind}): its losses compare them",
        )


def _say_lengths(counts: _Counts, config: TrainConfig, sides: Sequence[str], found: Findings) -> None:
    fields = {"student": "max_length_new", "teacher": "max_length_teacher"}
    for name in sides:
        share = counts.cut[name] / counts.documents
        if share > CUT_MUCH and not config.schedule.pack:
            found.note(
                "data",
                f"{share:.0%} of the documents reach {fields[name]}: what is behind it is cut off",
            )
        padded = 1 - counts.tokens[name] / counts.positions[name]
        if padded > PADDED_MUCH and not (config.schedule.pack or config.text.pack_documents):
            found.note(
                "data",
                f"{padded:.0%} of the {name}'s positions are padding",
                "pack_documents lays documents out in fuller rows (docs/data.md)",
            )
