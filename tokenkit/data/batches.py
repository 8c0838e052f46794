"""The batches of a run: which documents each rank sees at each step, tokenized ahead of time.

Step k trains on documents k * batch_size to (k + 1) * batch_size of the mix. A rank takes its
contiguous share and gradient accumulation splits that further, so neither the number of ranks nor of
micro-batches changes which documents a step sees. What has been read ahead does not count as consumed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from tokenkit.data.collate import AlignedCollator
from tokenkit.data.mix import Mix
from tokenkit.structs import Batch


class _Step(NamedTuple):
    micro_batches: list[Batch]
    state: dict[str, Any]
    """Of the mix, behind the last document of the step."""
    untokenized: Counter[str]
    """Rows that this rank could not tokenize so far."""


class Batches:
    """An endless iterator over steps, each the list of this rank's micro-batches.

    A rank whose share has no trained token contributes nothing; whether the whole step has one is known after
    the reduction of its counts.

    Args:
        mix: the documents; only this object may read it from now on.
        collator: turns documents into a batch.
        batch_size: documents of one step, over all ranks and micro-batches.
        accumulation: micro-batches of one rank and step.
        rank: this process's number.
        world: number of processes that share the documents of a step.
        prefetch: steps that are tokenized ahead in a background thread; 0: none.

    Raises:
        ValueError: if the documents of a step do not divide evenly.
    """

    def __init__(
        self,
        mix: Mix,
        collator: AlignedCollator,
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 1,
    ) -> None:
        if batch_size < 1 or accumulation < 1 or batch_size % (world * accumulation):
            raise ValueError(
                f"batch_size ({batch_size}) must be a positive multiple of the number of data-parallel "
                f"processes ({world}) times gradient_accumulation_steps ({accumulation})"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}): got {rank}")
        self._mix, self._collator = mix, collator
        self._batch_size, self._accumulation = batch_size, accumulation
        self._rank, self._world = rank, world
        self._prefetch = prefetch
        self._consumed = mix.state_dict()
        self._untokenized = Counter(collator.skipped)
        self._pending: deque[Future[_Step]] = deque()
        # one worker: steps must be read in order
        self._pool = ThreadPoolExecutor(1, "tokenkit-data") if prefetch else None

    def __iter__(self) -> Iterator[list[Batch]]:
        """Return itself: steps never end."""
        return self

    def __next__(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step.

        Raises:
            ValueError: if the data cannot go on.
        """
        if self._pool is None:
            step = self._read_step()
        else:
            while len(self._pending) <= self._prefetch:
                self._pending.append(self._pool.submit(self._read_step))
            step = self._pending.popleft().result()
        self._consumed, self._untokenized = step.state, step.untokenized
        return step.micro_batches

    def _read_step(self) -> _Step:
        documents = self._mix.take(self._batch_size)
        share = self._batch_size // self._world
        size = share // self._accumulation
        mine = documents[self._rank * share : (self._rank + 1) * share]
        batches = [self._collator.collate(mine[start : start + size]) for start in range(0, share, size)]
        return _Step(batches, self._mix.state_dict(), Counter(self._collator.skipped))

    @property
    def skipped(self) -> Counter[str]:
        """Rows that were no documents, by reason, up to the last step given out; the same on all ranks."""
        return sum((Counter(source["skipped"]) for source in self._consumed["sources"]), Counter())

    @property
    def untokenized(self) -> Counter[str]:
        """Documents that this rank could not tokenize, by reason, up to the last step given out."""
        return Counter(self._untokenized)

    def state_dict(self) -> dict[str, Any]:
        """Return the state behind the last step given out; JSON, and the same on all ranks."""
        return self._consumed

    def load_state_dict(self, state: Mapping[str, Any], untokenized: Mapping[str, int] | None = None) -> None:
        """Continue where `state_dict` was taken; `Mix.load_state_dict` says what it raises.

        Args:
            state: what `state_dict` returned.
            untokenized: what this rank shall have counted so far.
        """
        self._stop_reading()
        self._mix.load_state_dict(state)
        self._consumed = self._mix.state_dict()
        self._count_from(untokenized or {})

    def close(self) -> None:
        """Stop the background thread; what it has read ahead is read again if the steps go on."""
        self._stop_reading()
        self._mix.load_state_dict(self._consumed)
        self._count_from(self._untokenized)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _count_from(self, untokenized: Mapping[str, int]) -> None:
        self._untokenized = Counter(untokenized)
        self._collator.skipped.clear()
        self._collator.skipped.update(untokenized)

    def _stop_reading(self) -> None:
        for future in self._pending:
            future.cancel()
        wait(self._pending)  # until the thread lets go of the mix
        self._pending.clear()
