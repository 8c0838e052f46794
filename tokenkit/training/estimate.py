"""What a training takes, before it is started: memory by part, communication, time. No weight is read.

    memory = weights + gradients + optimizer / ranks, + what is gathered + activations + what the losses hold
    bytes  = 2 gathers of a student layer, 1 of a teacher layer, a micro-batch; 1 of the vocabularies, a step;
             1 reduction of the gradients a step; each times (ranks - 1) / ranks
             tables of experts that are cut by columns stay where they are: tokens travel (`expert_costs.py`)

Time is calculated for a share of the GPU's peak, which is assumed; nothing here was measured on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenkit.config import TrainConfig
from tokenkit.errors import TooLargeError, is_out_of_memory
from tokenkit.training.counting import Counted, count
from tokenkit.training.gpus import Gpu

MIB, GIB = 2**20, 2**30
RESERVED = 1.5 * GIB
"""Of a GPU, that its driver, its libraries and fragments of memory take."""


_ADAPTERS = "train adapters (train_model_mode lora)"
_PROCESSES = "share the run among more processes"
_FEWER = (
    "raise gradient_accumulation_steps (fewer documents at a time), lower max_length_new and "
    "max_length_teacher"
)
LEVERS = {
    "student": f"{_PROCESSES}, or take a smaller student",
    "teacher": f"{_PROCESSES}, or take a smaller teacher",
    "optimizer": f"{_ADAPTERS}, or {_PROCESSES}",
    "gradients": f"{_ADAPTERS}, or {_PROCESSES}",
    "gathered": "take a smaller vocabulary or model: each process gathers its embeddings and two layers",
    "activations": f"{_FEWER}, or turn gradient_checkpointing on",
    "losses": f"{_FEWER}, or lower loss_workspace_mib",
}
"""By part of the memory, what makes it smaller."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one rank needs."""

    memory: dict[str, float]
    """Bytes, by part."""
    peak: float
    traffic: float
    """Bytes that one rank receives in a step."""
    checkpoint: float
    """Bytes of one checkpoint, on disk, all ranks."""
    seconds: float | None
    """Of a step; None: no GPU was named."""
    tokens_per_second: float | None
    """Of the student, all ranks."""
    counted: Counted


def estimate(config: TrainConfig, ranks: int, gpu: Gpu | None = None, *, mfu: float = 0.4) -> Estimate:
    """Return what each of `ranks` processes needs.

    Args:
        config: of the training; no weights, no data are opened.
        ranks: processes over which both models are sharded; 1: none.
        gpu: for the time.
        mfu: share of the GPU's peak that matrix products reach.

    Raises:
        DataError: a model or tokenizer whose configuration cannot be read.
        ValueError: a batch that cannot be cut over so many ranks.
    """
    counted = count(config, ranks)
    share = 1 / ranks
    parts = {
        "student": counted.weights * share,
        "teacher": (counted.teacher + counted.teacher_vocabulary) * share,
        "optimizer": counted.optimizer * share,
        "gradients": counted.tables * share
        + (counted.gradients - counted.tables) * (share if counted.micro_batches == 1 else 1),
        "gathered": (2 * counted.layer + counted.vocabularies) if ranks > 1 else 0,
        "activations": counted.activations + counted.recomputed,
        "losses": counted.losses,
    }
    kept = parts["student"] + parts["teacher"] + parts["optimizer"] + parts["gathered"]
    begin = parts["activations"] + parts["losses"]
    if counted.micro_batches > 1:
        begin += parts["gradients"]
    peak = kept + max(begin, parts["gradients"] + counted.embedding_gradient)
    of_others = (ranks - 1) / ranks
    gathers = counted.micro_batches * (2 * counted.layers + counted.teacher_layers) + counted.vocabularies
    traffic = of_others * (gathers + counted.gradients - counted.tables)
    traffic += counted.micro_batches * counted.exchanged
    seconds = tokens = None
    if gpu is not None:
        flops = counted.micro_batches * (counted.body_flops + counted.head_flops)
        computing = flops / (gpu.tflops * 1e12 * mfu)
        updating = 5 * 4 * counted.trained * share / (gpu.memory_bandwidth * 1e9)
        moving = traffic / (gpu.link_of(ranks) * 1e9)
        seconds = max(computing, moving) + updating
        tokens = ranks * counted.micro_batches * counted.student_tokens / seconds
    return Estimate(
        memory={name: float(size) for name, size in parts.items()},
        peak=float(peak),
        traffic=float(traffic),
        checkpoint=float(4 * counted.trained + counted.optimizer),
        seconds=seconds,
        tokens_per_second=tokens,
        counted=counted,
    )


@contextmanager
def blaming_memory(config: TrainConfig, ranks: int) -> Iterator[None]:
    """Say of memory that runs out in the block what holds it, and what makes the largest part smaller.

    Raises:
        TooLargeError: in place of an error of the allocator.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        try:
            found = estimate(config, ranks)
        except Exception:  # there may be no memory left for it: the allocator's own words are said then
            raise error from None
        first = " ".join(str(error).partition(". If reserved but")[0].split()) or "no memory is left"
        raise TooLargeError(f"out of memory: {first[:200]}: {_held(found)}") from error


def _held(found: Estimate) -> str:
    parts = sorted(found.memory.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {_words(size)}" for name, size in parts[:4] if size)
    return (
        f"by the estimate a process needs {_words(found.peak)} beside its libraries ({largest}); for the "
        f"{parts[0][0]}, {LEVERS[parts[0][0]]}; --resume goes on where these fields move no number"
    )


def to_json(found: Estimate) -> dict[str, Any]:
    """Return an estimate as plain values."""
    return dataclasses.asdict(found)


def table(found: dict[int, Estimate], gpu: Gpu | None) -> str:
    """Return the estimates side by side, a column for each number of processes."""
    rows: list[tuple[str, list[str]]] = [("GPUs", [str(ranks) for ranks in found])]
    first = next(iter(found.values()))
    for part in first.memory:
        rows.append((f"  {part}", [_words(one.memory[part]) for one in found.values()]))
    rows.append(("peak of one GPU", [_words(one.peak) for one in found.values()]))
    if gpu is not None:
        room = gpu.memory_gib * GIB - RESERVED
        fits = ["yes" if one.peak <= room else f"no: {one.peak / room:.1f} times" for one in found.values()]
        rows.append((f"fits in {gpu.memory_gib} GiB", fits))
    rows.append(("received a step", [_words(one.traffic) for one in found.values()]))
    rows.append(("a checkpoint", [_words(one.checkpoint) for one in found.values()]))
    if first.seconds is not None:
        rows.append(("seconds a step, calculated", [f"{one.seconds:.3g}" for one in found.values()]))
        tokens = [f"{one.tokens_per_second:,.0f}" for one in found.values()]
        rows.append(("tokens/s, calculated", tokens))
    width = max(len(name) for name, _ in rows)
    columns = [max(len(cells[i]) for _, cells in rows) for i in range(len(found))]
    lines = [
        f"{name:<{width}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, columns, strict=True))
        for name, cells in rows
    ]
    counted = first.counted
    lines.append(
        f"{counted.trained:,} numbers are trained; {counted.micro_batches} micro-batches in a step, of "
        f"{counted.student_tokens:,} tokens at most"
    )
    return "\n".join(lines)


def _words(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 2 else f"{size / MIB:.0f} MiB"
