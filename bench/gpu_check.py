"""Everything that only a GPU can show, inside a budget of seconds, with nothing lost when a part of it fails.

    python bench/gpu_check.py --output DIR                 540 s; --budget for another number
    python bench/gpu_check.py --output DIR --stages ceilings gemm
    python bench/gpu_check.py --dry-run                    on a CPU, tiny sizes: shows that every stage runs

Each stage is a process group of its own with a limit; what it prints goes to DIR/logs.txt, each measurement
is appended at once to DIR/results.jsonl, and a stage that fails is a line there with the end of its log. A
stage whose kernels do not launch runs again with fallbacks: torch's lines for Triton's
(`launch.TORCH_EPILOGUES`), no descriptors (`TMA_ARCHITECTURE`), GEMMs without float32 output
(`products.WIDENS`). A summary of at most 60 lines ends it, also after SIGTERM. Without --output:
bench/results/<gpu>. Nothing is installed, and no setting of the card is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SUMMARY_LINES = 60
TAIL = 2_000  # characters of a failed stage's log that its line quotes
SMALLEST = 5.0  # seconds: less is not worth a start
FALLBACK = "--fallback"


@dataclass(frozen=True)
class Stage:
    """A part of the check."""

    name: str
    seconds: int
    """What it should take on a GPU; it is killed after one and a half times that."""
    decides: str
    keeps: int
    """Of stages that no longer fit the budget the lowest goes first."""
    falls_back: bool = False
    """Whether the stage runs again with fallbacks where it failed."""


STAGES = (
    Stage("ceilings", 15, "every ratio", 9),
    Stage("gemm", 30, "tile rule, padding of strides, rounding of chunks", 8),
    Stage("kernels", 45, "which epilogue to mend", 7),
    Stage("logprob", 70, "defaults of linear_logprob", 6, falls_back=True),
    Stage("divergence", 70, "defaults of divergences and sorted distances", 5, falls_back=True),
    Stage("correctness", 100, "a release", 4),
    Stage("waits", 50, "where a step waits for the device", 3),
    Stage("peers", 70, "the README's table", 2),
    Stage("autotune", 60, "the table BLOCKS", 1),
    Stage("counters", 30, "what the L2 cache holds", 0),
)


class Results:
    """The file of measurements: a line each, on the disk before the next begins."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, stage: str, **facts: Any) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **facts}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Return the lines; one torn by a kill is left out."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    arguments = parser.parse_args()
    if not arguments.dry_run and not has_gpu():
        print("gpu_check: no CUDA device: run it on a GPU, or with --dry-run", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory()) if arguments.dry_run else None
        folder = arguments.output or (Path(scratch) if scratch else HERE / "results" / gpu_folder())
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [stage for stage in STAGES if not arguments.stages or stage.name in arguments.stages]
        check = Check(folder, time.monotonic() + arguments.budget, dry_run=arguments.dry_run)
        signal.signal(signal.SIGTERM, check.stop)
        try:
            failed = check.run(chosen)
        finally:
            print("\n".join(summary(check.results.read()[check.first_line :])), flush=True)
    return int(failed > 0)


def has_gpu() -> bool:
    """Ask in another process: this one must not hold memory of the card."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def gpu_folder() -> str:
    """Return the folder of `bench/results` for this GPU."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from harness import folder_name as f; print(f('cuda'))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(HERE)], check=True, capture_output=True, text=True
    ).stdout.strip()


def clocks() -> str:
    """Return clock, power and temperature; nothing where the tool is absent."""
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    return ""


class Check:
    """Runs stages until the deadline."""

    def __init__(self, folder: Path, deadline: float, *, dry_run: bool):
        self.folder, self.deadline, self.dry_run = folder, deadline, dry_run
        self.results = Results(folder / "results.jsonl")
        self.first_line = len(self.results.read())
        self.running: subprocess.Popen[bytes] | None = None

    def run(self, stages: list[Stage]) -> int:
        """Run what fits, in order; return how many failed."""
        failed = 0
        for number, stage in enumerate(stages):
            left = self.deadline - time.monotonic()
            # what matters more and comes later keeps its time
            later = sum(other.seconds for other in stages[number + 1 :] if other.keeps > stage.keeps)
            if left - later < SMALLEST:
                self.results.add(stage.name, skipped=f"{left:.0f} s were left")
                continue
            error = self.attempt(stage, min(1.5 * stage.seconds, left - later))
            left = self.deadline - time.monotonic()
            if error and stage.falls_back and left > SMALLEST:
                error = self.attempt(stage, min(1.5 * stage.seconds, left), FALLBACK)
            failed += error
        return failed

    def attempt(self, stage: Stage, limit: float, *flags: str) -> bool:
        """Run a stage once; return whether it failed."""
        if self.dry_run:
            flags, limit = (*flags, "--dry-run"), 120
        command = [sys.executable, str(HERE / "gpu_stages.py"), stage.name, str(self.results.path), *flags]
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=str(HERE.parent))
        environment |= {"TRITON_INTERPRET": "1"} if self.dry_run else {}
        if not self.dry_run:
            environment.pop("TRITON_INTERPRET", None)
        log = self.folder / "logs.txt"
        before, began = clocks(), time.monotonic()
        with log.open("ab") as file:
            file.write(f"\n== {stage.name} {' '.join(flags)}\n".encode())
            file.flush()
            start = file.tell()
            self.running = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            code = self.wait(limit)
        seconds = round(time.monotonic() - began, 1)
        facts = {"seconds": seconds, "flags": list(flags), "clocks": [before, clocks()]}
        if code == 0:
            self.results.add(stage.name, done=True, **facts)
            return False
        with log.open("rb") as file:
            file.seek(start)
            tail = file.read().decode(errors="replace")[-TAIL:]
        reason = f"over its limit of {limit:.0f} s" if code is None else f"exit code {code}"
        self.results.add(stage.name, failed=reason, tail=tail, **facts)
        return True

    def wait(self, limit: float) -> int | None:
        """Wait for the running stage; kill its whole group after `limit` seconds and return None."""
        assert self.running is not None
        try:
            return self.running.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end_group()

    def end_group(self) -> None:
        """Kill what the stage left running too."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()
            self.running = None

    def stop(self, number: int, frame: object) -> None:
        """End at once; the summary is printed on the way out."""
        self.end_group()
        raise SystemExit(128 + number)


def summary(lines: list[dict[str, Any]]) -> list[str]:
    """Return what matters most in at most SUMMARY_LINES lines: each stage's end, then its headlines."""
    ends, headlines = [], []
    for line in lines:
        words = " ".join(line.get("flags", []))
        if line.get("done"):
            ends.append(f"{line['stage']:12s} ok {line['seconds']:6.1f} s {words}")
        elif "tail" in line:
            last = (line["tail"].strip().splitlines() or [""])[-1][:100]
            ends.append(f"{line['stage']:12s} FAILED ({line['failed']}) {words}: {last}")
        elif "skipped" in line:
            ends.append(f"{line['stage']:12s} skipped: {line['skipped']}")
        elif line.get("headline"):
            facts = {k: v for k, v in line.items() if k not in ("stage", "headline", "name")}
            shown = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items())
            headlines.append(f"{line['stage']:12s} {line['name']}: {shown}"[:150])
    room = SUMMARY_LINES - len(ends) - 1
    more = [f"... {len(headlines) - room + 1} more in results.jsonl"] if len(headlines) > room else []
    return [*headlines[: room - len(more)], *more, "", *ends]


if __name__ == "__main__":
    raise SystemExit(main())
