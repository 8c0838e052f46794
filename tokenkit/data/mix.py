"""Documents of one data set or of several by weight, in an order that can be resumed exactly.

Document number p of the mix comes from the data set that a hash of (seed, p) points at; each data set
has an order of its own (`sources.py`). So the order does not depend on the number of processes or
workers, and a state of a few numbers resumes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenkit.data.options import BadRowOptions, DataOptions, HeldoutOptions, SourceOptions
from tokenkit.data.places import place_of
from tokenkit.data.sources import Source, check_count, hash64
from tokenkit.tokenization.chat.documents import Document


class Mix:
    """An endless iterator over documents.

    Args:
        sources: the data sets.
        weights: share of each, in any unit.
        seed: decides which data set each document comes from.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        if not sources:
            raise ValueError("a mix needs at least one data set: got none")
        self.documents = 0
        """Documents given out so far."""
        self._sources, self._seed, self._now = list(sources), seed, 0
        self._upper = np.cumsum(np.array(weights, np.float64) / np.sum(weights))

    @property
    def epoch(self) -> int:
        """Passes over the first data set that are complete."""
        return self._sources[0].epoch

    @property
    def reading(self) -> str:
        """Where the mix is, for people."""
        source = self._sources[self._now]
        return f"data set {source.name}, row {source.position}"

    @property
    def skipped(self) -> Counter[str]:
        """Rows that were no documents, by reason."""
        return sum((source.skipped for source in self._sources), Counter())

    def __iter__(self) -> Iterator[Document]:
        """Return itself: documents never end."""
        return self

    def __next__(self) -> Document:
        """Return the next document; `sources.Source.__next__` says what it raises."""
        number = np.array([self.documents], np.uint64)
        point = hash64(hash64(np.array([self._seed], np.uint64)) ^ number)[0] / 2.0**64
        chosen = min(int(np.searchsorted(self._upper, point, side="right")), len(self._sources) - 1)
        self._now = chosen
        document = next(self._sources[chosen])
        self.documents += 1
        return document

    def take(self, count: int) -> list[Document]:
        """Return the next `count` documents."""
        return [next(self) for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue after the last document given out; JSON."""
        return {
            "documents": self.documents,
            "seed": self._seed,
            "sources": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: if the mix has another seed or other data sets than then.
        """
        if state["seed"] != self._seed or len(state["sources"]) != len(self._sources):
            raise ValueError(
                f"the state is of a mix of {len(state['sources'])} data sets with seed {state['seed']}: this "
                f"one has {len(self._sources)} with seed {self._seed}; resume with the same configuration"
            )
        check_count("documents", state["documents"])
        for source, saved in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        self.documents = state["documents"]


def open_data(options: DataOptions, seed: int = 0) -> tuple[Mix, list[Document]]:
    """Open the data of a run.

    Args:
        options: one data set or several.
        seed: decides the order; the held-out part does not depend on it.

    Returns:
        The documents to train on, endless, and the held-out ones.

    Raises:
        FileNotFoundError: if a path or a data set does not exist.
        ValueError: if a data set is empty, has no usable row, or lacks the fields asked for.
    """
    chosen = _sources(options)
    apart = _apart(options)
    sources = [
        Source(
            source,
            heldout=replace(options.heldout, fraction=0) if apart else options.heldout,
            bad_rows=options.bad_rows,
            seed=(seed, number),
            block_size=options.shuffle_buffer_size,
        )
        for number, source in enumerate(chosen)
    ]
    mix = Mix(sources, [source.weight for source in chosen], seed)
    if apart:
        return mix, read_documents(apart, options.heldout.documents)
    each = -(-options.heldout.documents // len(sources))
    heldout = [document for source in sources for document in source.heldout(each)]
    return mix, heldout[: options.heldout.documents]


def local_files(options: DataOptions) -> list[Path]:
    """Return the files of the data sets that are on this machine.

    Raises:
        FileNotFoundError: a path that leads nowhere, or to no data file.
    """
    return [file for source in _sources(options) for file in place_of(source, options.bad_rows).files]


def read_documents(options: SourceOptions, limit: int | None = None) -> list[Document]:
    """Return the documents of one data set in their own order, such as a separate evaluation set.

    Raises:
        FileNotFoundError: if the path or the data set does not exist.
        ValueError: if it holds no document, or a row is none.
    """
    source = Source(
        options,
        heldout=HeldoutOptions(fraction=0),
        bad_rows=BadRowOptions(action="raise"),
        seed=(0,),
        block_size=1,
    )
    return source.documents(limit)


def _apart(options: DataOptions) -> SourceOptions | None:
    """Return the text to measure on, where it is not a part of the training data."""
    name = options.heldout.dataset_name
    if name is None:
        return None
    return SourceOptions(path=name, text_field=options.text_field, text_template=options.text_template)


def _sources(options: DataOptions) -> tuple[SourceOptions, ...]:
    if options.datasets:
        return options.datasets
    if options.dataset_name is None:
        raise ValueError("no data: set data.dataset_name (a file, folder or hub name) or data.datasets")
    return (
        SourceOptions(
            path=options.dataset_name,
            subset=options.dataset_config_name,
            split=options.split,
            streaming=options.streaming,
            text_field=options.text_field,
            text_template=options.text_template,
        ),
    )
