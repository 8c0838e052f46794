"""Stages of `gpu_check.py` that run benchmarks of single operations: ours, then others at the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenkit.kernels.head import tiles

MIB = 2**20
PEER_SECONDS = 60


def measured(stage: Any, module: Any, case: Any, keep: Callable[[str], bool], **facts: Any) -> None:
    """Time forward and backward of the contenders of a benchmark that `keep` names, beside their GEMMs."""
    problem = module.Problem(case, stage.device)
    floor = module.floors(problem, stage.repetitions, stage.device)
    chosen = {name: x for name, x in module.contenders(stage.device).items() if keep(name)}
    for name, contender in chosen.items():
        parts = contender if isinstance(contender, tuple) else None  # linear_logprob's are tuples
        gemms = parts[1] if parts else contender.gemms
        step = module.step_of(problem, parts[0], parts[2]) if parts else module.step_of(problem, contender)
        words = parts and (name, parts[0], parts[2])
        errors = module.error_of(problem, *words) if words else module.error_of(problem, contender)
        peak = bytes_above(step, stage)
        ms = stage.median(step)
        title = f"{name} {case.name()}"
        stage.add(title, headline=True, ms=ms, floor=ms / floor[gemms], MiB=peak / MIB, **errors, **facts)


def bytes_above(step: Callable[[], object], stage: Any) -> int:
    """Return the peak above what is allocated before; on a CPU, where memory.py measures it, 0."""
    if stage.device == "cpu":
        step()
        return 0
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def logprob(stage: Any) -> None:
    """End to end: modes by tile sizes at one shape, the defaults at two more."""
    import linear_logprob as bench

    def ours(name: str) -> bool:
        return name in ("recompute", "recompute + mass", "cached + mass", "frozen + mass")

    shapes = [(8, 1)] if stage.dry_run else [(128, 40), (128, 80), (128, 120), (256, 120), (256, 240)]
    before = tiles.TILE_BYTES, tiles.TILE_FLOP
    case = bench.TINY_CASE if stage.dry_run else bench.Case()
    for most, gflop in shapes:
        tiles.TILE_BYTES, tiles.TILE_FLOP = most * MIB, gflop * 10**9
        measured(stage, bench, case, ours, tiles_MiB_GFLOP=[most, gflop])
    tiles.TILE_BYTES, tiles.TILE_FLOP = before
    others = [(2048, 2048, 151_936), (8192, 4096, 256_000)]
    for tokens, hidden, vocab in [] if stage.dry_run else others:
        measured(stage, bench, bench.Case(tokens=tokens, hidden=hidden, vocab=vocab), ours)


def divergence(stage: Any) -> None:
    """Divergences and sorted distances at long and short batches."""
    import linear_divergence
    import sorted_distance

    ours = ("weighted js", "weighted kl", "weighted kl map", "rows kl", "weighted", "tables", "frozen")
    for module in (linear_divergence, sorted_distance):
        cases = [module.TINY_CASE] if stage.dry_run else [module.Case(tokens=1024), module.Case()]
        for case in cases:
            measured(stage, module, case, ours.__contains__)


PEERS = {
    "linear_logprob": (
        "eager",
        "compiled",
        "F.linear_cross_entropy",
        "Liger (sum)",
        "TRL",
        "CCE",
        "CCE exact",
    ),
    "linear_divergence": ("eager js", "compiled js", "Liger js", "Liger js chunked", "TRL js"),
}


def peers(stage: Any) -> None:
    """Others at the same shapes; each in a process of its own, for some compile for a minute."""
    for module, names in PEERS.items():
        for name in names[: 1 if stage.dry_run else None]:
            if error := stage.child(f"peer:{module}:{name}", seconds=PEER_SECONDS):
                stage.add(name, headline=True, failed=error)


def one_peer(stage: Any, module: str, name: str) -> None:
    """Measure one contender of a benchmark, where what it needs is installed."""
    bench = __import__(module)
    if name not in bench.contenders(stage.device):
        stage.add(name, failed="not installed here")
        return
    measured(stage, bench, bench.TINY_CASE if stage.dry_run else bench.Case(), {name}.__contains__)
