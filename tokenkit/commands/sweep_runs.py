"""The runs of a sweep: one after the other, several at once, or as an array job of Slurm."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tokenkit.errors import ExitCode
from tokenkit.run.ending import read_outcome

if TYPE_CHECKING:
    from tokenkit.commands.sweep import Sweep, SweepOptions

POLL_SECONDS = 0.2
Running = dict[str, tuple["subprocess.Popen[bytes]", IO[bytes], int]]


def is_done(sweep: Sweep, name: str) -> bool:
    """Whether a run has come to its end."""
    return read_outcome(sweep.run_folder(name)).get("outcome") == "done"


def run_all(sweep: Sweep, options: SweepOptions) -> int:
    """Run what is not done; return 0, or the exit code of the first run that failed.

    A run that fails does not keep the others from running. Ctrl-C reaches the runs too, SIGTERM is passed on:
    they save, and no other is started.
    """
    waiting = [point.name for point in sweep.points if not is_done(sweep, point.name)]
    running: Running = {}
    codes: list[int] = []
    stops: list[int] = []

    def stop(number: int, frame: object) -> None:
        stops.append(number)
        for process, _, _ in running.values():
            if number == signal.SIGTERM or len(stops) > 1:
                process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    print(f"{len(sweep.points)} runs, {len(waiting)} of them to do: {sweep.folder}", flush=True)
    try:
        while running or (waiting and not stops):
            while waiting and len(running) < options.jobs and not stops:
                name = waiting.pop(0)
                slot = next(i for i in range(options.jobs) if i not in [s for _, _, s in running.values()])
                running[name] = (*_start(sweep, name, options, slot), slot)
            time.sleep(POLL_SECONDS)
            for name in [name for name, (process, _, _) in running.items() if process.poll() is not None]:
                process, log, _ = running.pop(name)
                log.close()
                codes += [process.returncode] if process.returncode else []
                print(f"{name}: {_ending(sweep, name, process.returncode)}", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ExitCode.PREEMPTED if stops else next((code if code > 0 else 1 for code in codes), 0)


def _start(
    sweep: Sweep, name: str, options: SweepOptions, slot: int
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    path = sweep.folder / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    environment = dict(os.environ)
    devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if options.jobs > 1 and len(devices) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    command = [*_launcher(options), "-m", "tokenkit.train", "--config", str(sweep.file(name))]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
    )
    return process, log


def _launcher(options: SweepOptions) -> list[str]:
    return shlex.split(options.launch) if options.launch else [sys.executable]


def _ending(sweep: Sweep, name: str, code: int) -> str:
    """How a run ended, and what to read."""
    if code == 0:
        return "done"
    lines = (sweep.folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return f"exit code {code}, {lines[-1] if lines else 'without a word'} (logs/{name}.log)"


def write_slurm(sweep: Sweep, options: SweepOptions) -> str:
    """Write an array job, a task for each run that is not done, and return how to submit it.

    Raises:
        FileExistsError: a file that is not of this sweep stands in its place.
    """
    folder = Path(str(options.slurm)).expanduser().absolute()
    names = [point.name for point in sweep.points]
    indices = [str(index) for index, name in enumerate(names) if not is_done(sweep, name)]
    if not indices:
        return f"all {len(names)} runs are done: {sweep.folder}"
    head = ["#!/usr/bin/env bash", f"# Sweep {sweep.folder}. `tokenkit sweep --slurm` writes it again."]
    (sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
    # two minutes before the end the signal reaches Python, which the shell becomes: it saves and ends with 75
    limits = [
        "--job-name=tokenkit-sweep",
        f"--array={','.join(indices)}" + (f"%{options.jobs}" if options.jobs > 1 else ""),
        f"--output={shlex.quote(f'{sweep.folder}/logs/task_%a.log')}",
        "--open-mode=append",
        "--requeue",
        "--signal=B:TERM@120",
        *shlex.split(options.slurm_options),
    ]
    command = " ".join(shlex.quote(word) for word in [*_launcher(options), "-m", "tokenkit.train"])
    body = [
        "set -euo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        "points=(",
        *[f"  {shlex.quote(str(sweep.file(name)))}" for name in names],
        ")",
        f'exec {command} --config "${{points[$SLURM_ARRAY_TASK_ID]}}"',
    ]
    path = folder / "sweep.sbatch"
    if path.exists() and path.read_text(encoding="utf-8").splitlines()[:2] != head:
        raise FileExistsError(f"{path} is of another sweep: name another folder with --slurm")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*head, *[f"#SBATCH {limit}" for limit in limits], *body]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{len(indices)} of {len(names)} runs to do: sbatch {path}"
