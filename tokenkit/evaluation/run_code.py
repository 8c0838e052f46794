"""Run a program that a model wrote: in a process of its own, with limits on time, memory, files and network.

The limits are those of Linux for one process; they keep a careless program from harm, not an attacker. Where
the system lets a user have namespaces, the process has no network; elsewhere it has, so run such tasks in a
container.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import comb

SECONDS = 6.0  # for a program, of wall time; of processor time one less
MEBIBYTES = 1024  # of address space, Python's own included
_CLONE_NEW = 0x10000000 | 0x40000000  # user and network namespaces

PROGRAM = f"""
import ctypes, os, resource, sys
program = sys.stdin.read()
try:
    ctypes.CDLL(None).unshare({_CLONE_NEW})
except (OSError, AttributeError):
    pass
for name, most in (
    ("RLIMIT_CPU", {int(SECONDS) - 1}), ("RLIMIT_AS", {MEBIBYTES << 20}), ("RLIMIT_FSIZE", 1 << 20),
    ("RLIMIT_NOFILE", 32), ("RLIMIT_CORE", 0), ("RLIMIT_NPROC", 32),
):
    resource.setrlimit(getattr(resource, name), (most, most))
sys.stdin = open(os.devnull)
exec(compile(program, "answer.py", "exec"), {{"__name__": "__main__"}})
"""


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Return whether a program ends without an error, in time.

    Args:
        program: Python, the answer and its tests.
        seconds: of wall time.
    """
    with tempfile.TemporaryDirectory(prefix="tokenkit-answer-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", PROGRAM],
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(program.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode == 0


def pass_at_k(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
) -> dict[str, float]:
    """Return the chance that one of k programs, drawn from those that were written, passes its tests.

    Chen et al. 2021, arXiv:2107.03374, equation 1: 1 - C(n - c, k) / C(n, k) with c of n that pass; the mean
    over the problems.

    Args:
        references: the tests of each problem.
        predictions: the programs of each.
        k: one or several; those above the number of programs are left out.
    """
    kinds = [k] if isinstance(k, int) else list(k)
    found: dict[str, list[float]] = {}
    for tests, programs in zip(references, predictions, strict=True):
        passed = sum(passes(f"{program}\n{tests}\n") for program in programs)
        for drawn in kinds:
            if drawn <= len(programs):
                missed = comb(len(programs) - passed, drawn) / comb(len(programs), drawn)
                found.setdefault(f"pass@{drawn}", []).append(1 - missed)
    return {name: sum(values) / len(values) for name, values in found.items()}


def with_prompt(answers: Sequence[Sequence[str]], documents: Sequence[dict[str, str]]) -> list[list[str]]:
    """Return the programs that answers make with their prompts, up to a code fence."""
    return [
        [document["prompt"] + answer.split("```")[0] for answer in own]
        for own, document in zip(answers, documents, strict=True)
    ]
