"""How many rows one pass over some data sets gives: a schedule that counts in epochs has to know."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tokenkit.data.collate import AlignedCollator
from tokenkit.data.options import BadRowOptions, HeldoutOptions, SourceOptions
from tokenkit.data.packing import BLOCK
from tokenkit.data.sources import Source
from tokenkit.errors import blaming_data
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.tokenizer import load_tokenizer


def rows_of_an_epoch(
    sources: Sequence[SourceOptions], heldout_fraction: float, tokenizer_name: str, length: int | None
) -> int:
    """Return the rows that all documents of some data sets make, without those held out.

    Args:
        sources: the data sets; their weights say how often each is drawn, not how long an epoch is.
        heldout_fraction: as in `HeldoutOptions`.
        tokenizer_name: a tokenizer's spec.
        length: tokens of a row that is filled (every document is tokenized to count them); None: each
            document is a row.
    """
    with blaming_data():
        collator = AlignedCollator(load_tokenizer(tokenizer_name))
        rows = 0
        for options in sources:
            opened = Source(
                options,
                heldout=HeldoutOptions(fraction=heldout_fraction),
                bad_rows=BadRowOptions(),
                seed=(0,),
                block_size=1,
            )
            documents = _once(opened)
            if length is None:
                rows += sum(1 for _ in documents)
                continue
            tokens = 0
            while block := list(itertools.islice(documents, BLOCK)):
                tokens += len(collator.tokens_of(block).ids_N)
            rows += tokens // length
    return rows


def _once(source: Source) -> Iterator[Document]:
    """Yield the documents of one pass."""
    while True:
        document = next(source)
        if source.epoch > 0:
            return
        yield document
