"""The stages of `gpu_check.py`, each run in a process of its own:

    python bench/gpu_stages.py STAGE RESULTS [--dry-run] [--fallback]

A stage appends its measurements to RESULTS as it goes, so that what it found survives whatever ends it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_check import FALLBACK, Results
from gpu_losses import divergence, logprob, one_peer, peers
from harness import time_interleaved
from torch import Tensor

from tokenkit.kernels import launch
from tokenkit.kernels.head import products
from tokenkit.kernels.linear_logprob import fused as linear_logprob_fused

REPETITIONS = 15
MIB = 2**20
CHECK_SECONDS, CHECKS_AT_ONCE = 60, 4


class Stage:
    """What a stage is told, and where it writes."""

    def __init__(self, name: str, results: Results, *, dry_run: bool):
        self.name, self.results, self.dry_run = name, results, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.dtype = torch.float32 if dry_run else torch.bfloat16
        self.repetitions = 1 if dry_run else REPETITIONS

    def add(self, name: str, *, headline: bool = False, **facts: Any) -> None:
        """Write one measurement; a headline is shown in the summary."""
        self.results.add(self.name, name=name, headline=headline, **facts)

    def median(self, step: Callable[[], object]) -> float:
        """Return milliseconds."""
        return time_interleaved({"": step}, self.repetitions, self.device)[""].median

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return what is random: products of zeros run faster than real ones."""
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def child(self, words: str, seconds: float) -> str:
        """Run a part in a process of its own; return why it failed, or an empty text."""
        flags = ["--dry-run"] if self.dry_run else []
        command = [sys.executable, __file__, words, str(self.results.path), *flags]
        try:  # in this stage's process group: what ends the stage ends it too
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return f"over its limit of {seconds:.0f} s"
        print(done.stdout, done.stderr, sep="\n")
        return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1][:300]


def ceilings(stage: Stage) -> None:
    """What the machine can do at best: bytes, products, launches."""
    count = MIB if stage.dry_run else 2**31
    source = stage.random(count, dtype=torch.float32 if stage.dry_run else torch.bfloat16)
    target = torch.empty_like(source)
    ms = stage.median(lambda: target.copy_(source))
    stage.add("copy", headline=True, GBps=2 * source.nbytes / ms / 1e6)
    size = 64 if stage.dry_run else 8192
    left, right = stage.random(size, size), stage.random(size, size)
    ms = stage.median(lambda: left @ right)
    stage.add("product of 8192^3", headline=True, TFLOPs=2 * size**3 / ms / 1e9)
    hot = source[: 8 * MIB]
    stage.add("sum of 16 MiB, hot", GBps=hot.nbytes / stage.median(lambda: hot.sum()) / 1e6)
    small, launches = stage.random(16), 100

    def many() -> None:
        for _ in range(launches):
            small.add_(1)

    stage.add("launch, stream", headline=True, us=1e3 * stage.median(many) / launches)
    if stage.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        stage.add("launch, graph", us=1e3 * stage.median(graph.replay) / launches)


def gemm(stage: Stage) -> None:
    """Whether sums are float32 whatever the shape, and what tiles, strides and row counts cost."""
    shapes = [(1, 64, 33), (129, 1, 64), (7, 513, 40)] + ([] if stage.dry_run else [(1000, 4093, 2047)])
    for N, V, D in shapes:
        left, right, total = stage.random(N, D), stage.random(V, D), stage.random(N, V, dtype=torch.float32)
        truth = left.double() @ right.double().T
        out = products.product(left, right.T, torch.empty_like(total))
        error = ((out - truth).norm() / truth.norm()).item()
        truth = truth + total.double()
        products.add_product(total, left, right.T)
        added = ((total - truth).norm() / truth.norm()).item()
        sound = max(error, added) < 1e-5
        stage.add(f"float32 sums {N}x{V}x{D}", headline=not sound, error=error, added=added, sound=sound)
    columns = [64, 100] if stage.dry_run else [1024, 2048, 4093, 4096, 8192, 16_384]
    rows = [32] if stage.dry_run else [46, 239, 1152, 1170, 2048, 8192]
    for D, V, N in product([32] if stage.dry_run else [2048, 4096], columns, rows):
        hidden, weight = stage.random(N, D), stage.random(V, D)
        z32, dz = torch.empty(N, V, device=stage.device), stage.random(N, V)
        dhidden = torch.zeros(N, D, device=stage.device)
        steps = {
            "z": partial(products.product, hidden, weight.T, z32),
            "z low": partial(torch.mm, hidden, weight.T, out=torch.empty_like(dz)),
            "dX": partial(products.add_product, dhidden, dz, weight),
            "dW": partial(torch.mm, dz.T, hidden),
        }
        for name, timing in time_interleaved(steps, stage.repetitions, stage.device).items():
            stage.add(f"{name} {N}x{V}x{D}", ms=timing.median, TFLOPs=2 * N * V * D / timing.median / 1e9)


def kernels(stage: Stage) -> None:
    """Triton's lines against torch's on the same inputs, and the device time of each kernel of a step."""
    if stage.dry_run:
        launch.INTERPRET = True  # the process was started with TRITON_INTERPRET=1
    N, V, D = (8, 100, 32) if stage.dry_run else (8192, 128_256, 2048)
    for name, step in operations(stage, N, V, D).items():
        found, times = {}, {}
        for lines in ("triton", "torch"):
            launch.TORCH_EPILOGUES = lines == "torch"
            try:
                found[lines] = step()
                times[lines] = stage.median(step)
            except Exception as error:  # one broken kernel must not hide the others
                stage.add(f"{name} {lines}", headline=True, failed=f"{type(error).__name__}: {error}"[:300])
        launch.TORCH_EPILOGUES = False
        if len(times) == 2:
            error = ((found["triton"] - found["torch"]).norm() / found["torch"].norm()).item()
            ratio = times["triton"] / times["torch"]
            stage.add(name, headline=True, error=error, ms=times["triton"], of_torch=ratio)
            if stage.device == "cuda":
                stage.add(f"{name} by kernel", us=device_times(step))


def operations(stage: Stage, N: int, V: int, D: int) -> dict[str, Callable[[], Tensor]]:
    """Return forward and backward of each operation; each returns the gradient of the hidden states.

    An ensemble has no backward, and returns log p.
    """
    from tokenkit.kernels.linear_divergence import linear_divergence
    from tokenkit.kernels.linear_ensemble import Part, linear_ensemble
    from tokenkit.kernels.linear_logprob import linear_logprob
    from tokenkit.kernels.sorted_distance import sorted_distance
    from tokenkit.structs import Head

    hidden, other = stage.random(N, D), stage.random(N, D)
    weight, theirs = stage.random(V, D) / D**0.5, stage.random(V, D) / D**0.5
    target = torch.randint(V, (N,), device=stage.device)
    subset = torch.rand(V, device=stage.device) < 0.35
    rows = torch.rand(N, device=stage.device)

    def differentiated(function: Callable[[Tensor, Head], Tensor], *, frozen: bool = False) -> Tensor:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        (function(x, Head(w)) * rows).sum().backward()
        assert x.grad is not None
        return x.grad

    def logprob(x: Tensor, head: Head, budget: int) -> Tensor:
        found = linear_logprob(x, head, target, subset_V=subset, workspace_bytes=budget)
        assert found.subset_logp_N is not None
        return found.logp_N + found.subset_logp_N

    def ensemble(combination: Any) -> Tensor:
        parts = [Part(hidden, Head(weight), 0.5), Part(other, Head(theirs), 0.5)]
        return linear_ensemble(parts, target, combination).logp_N

    steps = {
        "logprob recompute": partial(differentiated, partial(logprob, budget=256 * MIB)),
        "logprob cached": partial(differentiated, partial(logprob, budget=1 << 36)),
        "logprob frozen": partial(differentiated, partial(logprob, budget=256 * MIB), frozen=True),
        "sorted distance": partial(
            differentiated, lambda x, head: sorted_distance(x, head, other, Head(theirs))
        ),
        **{f"ensemble {how}": partial(ensemble, how) for how in ("mean_prob", "mean_logits", "max")},
    }
    for kind in (
        ("kl",) if stage.dry_run else ("kl", "rkl", "js", "akl")
    ):  # the interpreter takes seconds each
        steps[kind] = partial(
            differentiated, lambda x, head, kind=kind: linear_divergence(x, head, other, Head(theirs), kind)
        )
    return steps


def device_times(step: Callable[[], object]) -> dict[str, float]:
    """Return microseconds on the device by kernel, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:12]
    return {event.key[:80]: event.self_device_time_total for event in found}


def correctness(stage: Stage) -> None:
    """Every check of `tests/kernels/gpu_checks.py`, each in a process of its own."""
    from tests.kernels.gpu_checks import CHECKS

    names = [check.__name__ for check in CHECKS][: 2 if stage.dry_run else None]
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        for name, error in zip(
            names,
            pool.map(lambda name: stage.child(f"check:{name}", seconds=CHECK_SECONDS), names),
            strict=True,
        ):
            stage.add(name, headline=bool(error), **({"failed": error} if error else {"ok": True}))


def one_check(name: str, *, dry_run: bool) -> None:
    """Run one check; its error is the last line of this process."""
    from tests.kernels import gpu_checks

    getattr(gpu_checks, name)(gpu_checks.TINY if dry_run else gpu_checks.Sizes())


def waits(stage: Stage) -> None:
    """Where a training step makes the host wait, and how long the device is busy."""
    from gpu_step import measure_step

    measure_step(stage)


def autotune(stage: Stage) -> None:
    """The statistics of `linear_logprob_fused` under other tiles, stages and warps."""
    if stage.dry_run:
        launch.INTERPRET = True
    N, V, D = (8, 100, 32) if stage.dry_run else (8192, 128_256, 2048)
    kind = f"statistics {8 * stage.dtype.itemsize}"
    before = linear_logprob_fused.BLOCKS[kind]
    cuts: Iterator[Any] = product((64, 128), (128, 256), (3, 4), (4, 8))
    for tokens, rows, stages, warps in list(cuts)[: 1 if stage.dry_run else None]:
        for least, cut in before.items():
            changed = cut._replace(tokens=tokens, rows=rows, stages=stages, warps=warps)
            linear_logprob_fused.BLOCKS[kind] = before | {least: changed}
        name = f"statistics {tokens}x{rows} stages {stages} warps {warps}"
        try:
            stage.add(name, ms=stage.median(partial(statistics_alone, stage, N, V, D)))
        except Exception as error:  # more shared memory than there is: that configuration is out
            stage.add(name, failed=f"{type(error).__name__}: {error}"[:200])
    linear_logprob_fused.BLOCKS[kind] = before


def statistics_alone(stage: Stage, N: int, V: int, D: int) -> None:
    """The forward without workspace."""
    from tokenkit.kernels.linear_logprob import linear_logprob
    from tokenkit.structs import Head

    torch.manual_seed(0)
    hidden, weight = stage.random(N, D), stage.random(V, D) / D**0.5
    target = torch.randint(V, (N,), device=stage.device)
    with torch.no_grad():
        linear_logprob(hidden, Head(weight), target, workspace_bytes=0)


def counters(stage: Stage) -> None:
    """Bytes and hits of the caches by Nsight Compute, where it is installed."""
    ncu = shutil.which("ncu")
    if stage.dry_run or ncu is None:
        stage.add("ncu", failed="not run on a CPU" if stage.dry_run else "not installed here")
        return
    metrics = "dram__bytes.sum,lts__t_sector_hit_rate.pct,sm__inst_executed_pipe_tensor.sum"
    report = stage.results.path.with_name("ncu.csv")
    target = [sys.executable, __file__, "counted", str(stage.results.path)]
    command = [ncu, "--clock-control", "none", "--csv", "--metrics", metrics, "--launch-count", "60", *target]
    with report.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=45, check=False)
    stage.add("ncu", headline=True, exit_code=done.returncode, bytes=os.path.getsize(report))


def counted(stage: Stage) -> None:
    """What `counters` looks at: one step of each kind at a size that fills the card."""
    for name, step in operations(stage, 4096, 65_536, 2048).items():
        if name in ("logprob recompute", "js", "sorted distance"):
            step()


STAGES = {
    function.__name__: function
    for function in (
        *(
            ceilings,
            gemm,
            kernels,
            logprob,
            divergence,
            correctness,
            waits,
            peers,
            autotune,
            counters,
            counted,
        ),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("results", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(FALLBACK, action="store_true")
    arguments = parser.parse_args()
    if arguments.fallback:
        launch.TORCH_EPILOGUES, products.WIDENS = True, False
        linear_logprob_fused.TMA_ARCHITECTURE = 10**6
    kind = arguments.stage.partition(":")[0]
    stage = Stage("peers" if kind == "peer" else kind, Results(arguments.results), dry_run=arguments.dry_run)
    torch.manual_seed(0)
    run(arguments.stage, stage)


def run(words: str, stage: Stage) -> None:
    """Run a stage, or a part that runs in a process of its own: check:NAME, peer:BENCHMARK:NAME."""
    kind, _, rest = words.partition(":")
    if kind == "check":
        one_check(rest, dry_run=stage.dry_run)
    elif kind == "peer":
        one_peer(stage, *rest.split(":", 1))
    else:
        STAGES[kind](stage)


if __name__ == "__main__":
    main()
