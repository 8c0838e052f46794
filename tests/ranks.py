"""Run a function in forked gloo ranks: seconds less than torchrun, because torch is imported already."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.process_state import forget_accelerate
from tokenkit import parallel

KILLED = -signal.SIGKILL


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    always_shard: bool = True,
) -> list[Any]:
    """Return what `function(world, *args)` returned on each rank.

    Raises:
        RuntimeError: a rank failed, with its traceback.
        TimeoutError: a rank hung; all are killed.
    """
    ranks = start_ranks(function, world_size, *args, always_shard=always_shard)
    codes = wait_ranks(ranks, timeout)
    if any(codes):
        words = "\n".join((ranks.folder / f"{rank}.err").read_text()[-3000:] for rank in range(world_size))
        raise RuntimeError(f"exit codes {codes}:\n{words}")
    files = [ranks.folder / f"{rank}.pt" for rank in range(world_size)]
    results = [torch.load(file, weights_only=True)["result"] for file in files]
    shutil.rmtree(ranks.folder)
    return results


class Ranks:
    """Forked processes, and the folder of their results and errors."""

    def __init__(self, folder: Path, pids: list[int]):
        self.folder = folder
        self.pids = pids


def start_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    always_shard: bool = True,
    collective_timeout: float = 60.0,
) -> Ranks:
    """Fork the ranks and return at once."""
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    port = _free_port()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _child(rank, world_size, port, folder, (function, args, always_shard, collective_timeout))
        pids.append(pid)
    return Ranks(folder, pids)


def wait_ranks(ranks: Ranks, timeout: float = 60.0) -> list[int]:
    """Return the exit code of each rank, `-signal` where a signal ended it; kill those that hang."""
    deadline = time.monotonic() + timeout
    codes: dict[int, int] = {}
    while len(codes) < len(ranks.pids):
        for pid in ranks.pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            kill_ranks([pid for pid in ranks.pids if pid not in codes])
            raise TimeoutError(f"ranks did not end within {timeout} s; exit codes so far: {codes}")
        time.sleep(0.005)
    return [codes[pid] for pid in ranks.pids]


def kill_ranks(pids: Sequence[int]) -> None:
    """Kill forked ranks that still run, without a chance to clean up."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(rank: int, world_size: int, port: int, folder: Path, job: tuple[Any, ...]) -> None:
    """Be rank `rank`; never return into the parent's stack."""
    function, args, always_shard, collective_timeout = job
    code = 1
    try:
        errors = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        forget_accelerate()  # of the parent, whose Trainers may have had another precision and one rank
        torch.set_num_threads(1)  # before any parallel region: a forked OpenMP pool hangs
        os.environ.update(
            WORLD_SIZE=str(world_size),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        world = parallel.start(backend="gloo", always_shard=always_shard, timeout=collective_timeout)
        result = function(world, *args)
        torch.save({"result": result}, folder / f"{rank}.pt")
        parallel.stop(world)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
