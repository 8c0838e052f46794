"""Measuring: interleaved contenders, a median with its spread, memory above inputs, one JSON per run."""

import argparse
import ctypes
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import triton

Step = Callable[[], object]
Rows = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender."""

    median: float
    p20: float
    p80: float

    @property
    def spread(self) -> float:
        """p80 over p20, less one; above 0.05 the machine was not quiet."""
        return self.p80 / self.p20 - 1


def time_interleaved(
    contenders: Mapping[str, Step], repetitions: int, device: str, *, processor_time: bool = False
) -> dict[str, Timing]:
    """Time each contender `repetitions` times, in turns, after one round that is not counted.

    `processor_time` counts what this process was given of a CPU, which a busy machine hardly moves as long
    as one thread computes (several spin while they wait for each other).
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repetitions + 1):
        for name, step in contenders.items():
            milliseconds = _time_once(
                step, device, time.process_time if processor_time else time.perf_counter
            )
            if round_:
                samples[name].append(milliseconds)
    return {name: _summary(values) for name, values in samples.items()}


def _time_once(step: Step, device: str, clock: Callable[[], float]) -> float:
    if device == "cpu":
        start = clock()
        step()
        return 1e3 * (clock() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high)


def peak_bytes(step: Step, device: str) -> int:
    """Return what `step` needs above what is allocated before it, its results included.

    On a CPU the resident set is sampled every millisecond. Memory that an earlier step freed may still be
    resident: some 10 MiB of noise, unless the process is fresh. Drop the gradients of an earlier step first:
    one that `step` itself frees is missing from the peak.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would hide what the step allocates
    before, peak, done = _resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident_bytes())

    watcher = threading.Thread(target=watch)
    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    watcher.start()
    step()
    done.set()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (after if after > high_water else max(peak, _resident_bytes())) - before


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def machine(device: str) -> dict[str, Any]:
    """Return what a number means nothing without."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"torch": torch.__version__, "triton": triton.__version__}
    if util.find_spec("transformers"):
        facts["transformers"] = metadata.version("transformers")
    facts |= {"commit": commit or "unknown", "python": platform.python_version()}
    if device == "cpu":
        cpu = platform.processor() or platform.machine()
        return facts | {"device": "cpu", "cpu": cpu, "threads": torch.get_num_threads()}
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    clocks = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return facts | {"device": torch.cuda.get_device_name(), "clocks": clocks}


def folder_name(device: str) -> str:
    """Return the folder of `bench/results` for this machine: cpu, or the GPU's name."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")


def print_table(rows: Mapping[str, Mapping[str, object]]) -> None:
    """Print one line per contender."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(map(len, rows), default=0)
    print(" " * width, *(f"{column:>16}" for column in columns))
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        print(f"{name:{width}}", *(f"{x:16.4g}" if isinstance(x, float) else f"{x!s:>16}" for x in cells))


def save(path: Path, device: str, results: object) -> None:
    """Write results beside the facts of the machine, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1) + "\n")
    print(f"written: {path}")


def as_row(timing: Timing) -> dict[str, float]:
    """Return a timing as columns."""
    return {"ms": timing.median, **{key: value for key, value in asdict(timing).items() if key != "median"}}


MEASURED = """
import importlib, re, sys, time
code = importlib.import_module(f"tokenkit.{sys.argv[1]}").main(sys.argv[3:])
kibibytes = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
open(sys.argv[2], "w").write(f"{time.process_time()} {kibibytes}")
sys.exit(code)
"""


def run_command(module: str, flags: list[str]) -> tuple[float, float, int]:
    """Run a command of tokenkit; return its processor and wall seconds, and its peak resident set in MiB."""
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile() as file:  # the kernel's ru_maxrss would count this process too
        subprocess.run([sys.executable, "-c", MEASURED, module, file.name, *flags], check=True)
        seconds, kibibytes = Path(file.name).read_text().split()
    return round(float(seconds), 1), round(time.perf_counter() - began, 1), int(kibibytes) // 1024


@dataclass(frozen=True)
class Cases:
    """What a benchmark of a kernel measures: dataclasses of sizes with a `name()`."""

    gpu: Any
    cpu: Any
    tiny: Any
    """Shows that the benchmark runs."""
    grid: Callable[[], Iterable[Any]]


def measure_cases(
    about: str, cases: Cases, measure: Callable[..., Rows], *, takes_model: bool = False
) -> None:
    """Read the command line of a benchmark, measure the cases that it names, print tables and save them.

    Args:
        about: docstring of the benchmark.
        cases: what can be measured.
        measure: takes case, device and repetitions, and with `takes_model` the name of a model or None.
        takes_model: whether the benchmark has `--model`.
    """
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--repetitions", type=int, default=30 if on_gpu else 5)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="one tiny case: shows that the benchmark runs")
    if takes_model:
        parser.add_argument("--model", help="take hidden states and head of this model")
    parser.add_argument("--save", type=Path, help="folder of results")
    arguments = parser.parse_args()
    more = {"model": arguments.model} if takes_model else {}
    model = more.get("model")
    default = cases.tiny if arguments.tiny else cases.cpu if arguments.device == "cpu" else cases.gpu
    for case in cases.grid() if arguments.grid else [default]:
        rows = measure(case, arguments.device, arguments.repetitions, **more)
        print(f"\n{case.name()}{f' of {model}' if model else ''}")
        print_table(rows)
        if arguments.save:
            path = arguments.save / f"{case.name()}{'_model' if model else ''}.json"
            save(path, arguments.device, {"case": asdict(case), **more, "rows": rows})
