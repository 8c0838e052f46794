"""`python -m tokenkit.launch OUTPUT [--restarts N] -- COMMAND ...`: a run's own exit code, and new starts.

torchrun ends with 1 whatever ended its workers. This door runs COMMAND (torchrun, `tokenkit train`), passes
signals on to it, and exits with the code that OUTPUT/outcome.json names, so that a scheduler can tell a stop
that goes on (75) from a configuration that never will (64). With `--restarts` it starts COMMAND again where
that may help, and no more once three starts in a row have come no checkpoint further. On several nodes leave
it at 0: all nodes must start again together, which is the scheduler's to do.

A torchrun that is cut off from the others waits long after its ranks have ended. What is left of COMMAND
`--linger` seconds after outcome.json said how the run ended is ended too.

It loads no torch, and needs nothing but the standard library beside tokenkit.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tokenkit.errors import CODE_FILE, ExitCode
from tokenkit.run.ending import RUNNING, read_outcome
from tokenkit.run.folder import OUTCOME_NAME

AGAIN = (ExitCode.FAULT, ExitCode.OTHER_RANK)
"""Codes after which another start may help by itself: a crash, a rank that is gone; docs/distributed.md."""
LINGER = 120.0
MOST_STANDSTILLS = 3  # starts in a row without a new checkpoint: it fails at the same step each time
_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")
_WAIT_SECONDS = 5.0
_LOOK_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, again where that may help; return the code of its last end."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = (
        (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    )
    parser = _Parser(
        prog="python -m tokenkit.launch",
        usage="%(prog)s OUTPUT [--restarts N] [--linger SECONDS] -- COMMAND ...",
        description="Run a training, and exit with the code that OUTPUT/outcome.json names.",
    )
    parser.add_argument("output", type=Path, help="output_dir of the run")
    parser.add_argument("--restarts", type=int, default=0, help="new starts after a crash (default: 0)")
    words_of_linger = f"seconds that the command may outlive the run's end (default: {LINGER:.0f})"
    parser.add_argument("--linger", type=float, default=LINGER, help=words_of_linger)
    options = parser.parse_args(own)
    if not command:
        return _refuse("write the command behind --: python -m tokenkit.launch OUTPUT -- torchrun ...")
    for name, number in (("restarts", options.restarts), ("linger", options.linger)):
        if number < 0:
            return _refuse(f"--{name} must be at least 0, got {number}")
    if options.restarts and "--resume" not in command:
        return _refuse(
            "--restarts needs --resume in the command: a new start goes on from the last checkpoint"
        )
    return Launch(options.output, command, options.linger).run(options.restarts)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it as every door does, with its exit code."""
        raise SystemExit(_refuse(f"{message}; {self.prog} --help says more"))


def _refuse(words: str) -> int:
    print(f"tokenkit: {words}", file=sys.stderr)
    return int(ExitCode.CONFIG)


class Launch:
    """One command, started once or several times.

    Args:
        output: `output_dir` of the run.
        command: what is started.
        linger: seconds that it may go on once the run has ended.
    """

    def __init__(self, output: Path, command: Sequence[str], linger: float = LINGER):
        self.output, self.command, self.linger = output, list(command), linger
        self._child: subprocess.Popen[bytes] | None = None
        self._is_asked = False

    def run(self, restarts: int) -> int:
        """Start the command, and again up to `restarts` times; return the exit code of the last end."""
        before = {name: signal.signal(name, self._pass_on) for name in _signals()}
        try:
            standstills = 0
            for left in range(restarts, -1, -1):
                reached = newest_step(self.output)
                code = self._start()
                standstills = 0 if newest_step(self.output) > reached else standstills + 1
                if code not in AGAIN or not left or self._is_asked:
                    return code
                if standstills == MOST_STANDSTILLS:
                    print(
                        f"tokenkit: {standstills} starts in a row came no further than the checkpoint of "
                        f"step {max(reached, 0)}: no progress; look at {self.output / OUTCOME_NAME}",
                        file=sys.stderr,
                    )
                    return int(ExitCode.NUMERICS)
                print(f"tokenkit: ended with {code}, starting again ({left} times left)", file=sys.stderr)
                time.sleep(min(_WAIT_SECONDS, standstills))
            return code
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _start(self) -> int:
        """Run the command to its end; return the code that is the run's own."""
        stamp = _stamp(self.output)
        with tempfile.TemporaryDirectory() as folder:
            left = Path(folder) / "code"
            surroundings = os.environ | {CODE_FILE: str(left)}
            try:  # in a group of its own: a terminal's Ctrl-C comes once, by `_pass_on`
                self._child = subprocess.Popen(self.command, start_new_session=True, env=surroundings)
            except OSError as error:
                return _refuse(f"{self.command[0]} could not be started: {error.strerror}")
            code = self._wait(self._child, stamp)
            own = self._said(stamp).get("code")
            if own is None and left.exists():  # refused before there was a folder
                own = int(left.read_text(encoding="ascii") or ExitCode.FAULT)
        if code == 0:
            return 0
        return own if isinstance(own, int) and own else code if code > 0 else int(ExitCode.FAULT)

    def _said(self, stamp: tuple[int, int] | None) -> dict[str, Any]:
        """Return the words of this start: an earlier run's say nothing of one that did not come so far."""
        return read_outcome(self.output) if _stamp(self.output) != stamp else {}

    def _wait(self, child: subprocess.Popen[bytes], stamp: tuple[int, int] | None) -> int:
        """Wait for the command; end it where the run has ended and it has not."""
        ended_at: float | None = None
        while True:
            with suppress(subprocess.TimeoutExpired):
                return child.wait(_LOOK_SECONDS)
            if ended_at is None and self._said(stamp).get("outcome", RUNNING) != RUNNING:
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > self.linger:
                print(f"tokenkit: the run has ended and {self.command[0]} has not: killed", file=sys.stderr)
                if hasattr(os, "killpg"):
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    child.kill()
                return child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        if self._child is not None:
            self._child.send_signal(number)


def newest_step(output: Path) -> int:
    """Return the step of the newest checkpoint, -1 where there is none; what is in it is not read."""
    steps = [path.name.removeprefix("step_") for path in (output / "checkpoints").glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def _stamp(output: Path) -> tuple[int, int] | None:
    try:
        about = (output / OUTCOME_NAME).stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ino


def _signals() -> list[signal.Signals]:
    found = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    return [number for number in found if signal.getsignal(number) != signal.SIG_IGN]


if __name__ == "__main__":
    sys.exit(main())
