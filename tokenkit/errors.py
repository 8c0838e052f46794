"""What may go wrong, in classes of who is to blame, and what the process then says to the shell."""

from __future__ import annotations

import difflib
import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """How a process ended, for whatever started it."""

    DONE = 0
    FAULT = 1
    """A fault of tokenkit or of the machine: start again with --resume, a few times."""
    CONFIG = 64
    """A wrong configuration: starting again will not help."""
    DATA = 65
    """Data or checkpoints that cannot be used: starting again will not help."""
    OTHER_RANK = 69
    """Another process failed and says why."""
    NUMERICS = 70
    """A loss or gradient that is not finite, or no progress: starting again will not help."""
    MEMORY = 71
    """Out of memory: start again with --resume once something is smaller."""
    DISK = 74
    """A disk that is full or cannot be written: start again with --resume once there is room."""
    PREEMPTED = 75
    """Stopped from outside after saving: start again with --resume."""
    INTERRUPTED = 130
    """Stopped from the keyboard a second time, without saving."""

    @classmethod
    def _missing_(cls, value: object) -> ExitCode:
        """Call any other code a fault."""
        return cls.FAULT


MEMORY_REMEDY = (
    "lower max_length_new and max_length_teacher, raise gradient_accumulation_steps (fewer documents at a "
    "time), turn gradient_checkpointing on, train adapters (train_model_mode lora), or share the run among "
    "more processes; --resume goes on from the last checkpoint where these fields move no number"
)


class ConfigError(ValueError):
    """The configuration cannot be used. One line: the field, what came, what to do."""

    exit_code = ExitCode.CONFIG


class DataError(ValueError):
    """A file, a data set, a tokenizer or a model cannot be used. One line: which, why, what to do."""

    exit_code = ExitCode.DATA


class StoppedError(KeyboardInterrupt):
    """A signal asked the process to end, where there was nothing to save first.

    As an interruption it passes through those who catch every `Exception`.
    """

    exit_code = ExitCode.PREEMPTED


class SilenceError(RuntimeError):
    """Somebody whom the run waits for is gone or does nothing. The words say who, and since when."""

    exit_code = 1
    is_told = True
    """One line says it all: a traceback would show who waited, not who failed."""
    is_own = False
    """It is this process that hangs."""


class TooLargeError(RuntimeError):
    """Memory ran out in a training. The words say what holds it by the estimate, and what to change."""

    exit_code = 71
    is_told = True


class NonFiniteError(ArithmeticError):
    """A loss or the gradient is NaN or infinite. Nothing was updated."""


class CheckpointError(OSError):
    """A checkpoint could not be written, or is not whole, or is not safe to read."""

    exit_code = 65


class ExportError(RuntimeError):
    """The exported folder does not reproduce the student. It was left beside its final name."""


class DiskError(OSError):
    """A disk takes no more, or what was written to it is gone. Make room, then go on with --resume."""

    exit_code = 74


class StuckError(TimeoutError):
    """The data does not come. The words say who waits, and for what."""

    exit_code = 1
    is_told = True


class TemplateError(ValueError):
    """A template that does not write these messages; the text says why."""


class OtherRankError(RuntimeError):
    """Another rank failed: this rank stops with it instead of waiting for it in the next collective."""

    exit_code = 69  # that rank says what was wrong, with a code of its own
    is_told = True

    def __init__(self, words: str, rank: int | None = None):
        """Args: words; rank: which one it was, where that is known."""
        super().__init__(words)
        self.rank = rank


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; without importing torch."""
    words = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (
            type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in words
            or "CUDA out of memory" in words
        )
    )


@contextmanager
def blaming_data() -> Iterator[None]:
    """Turn a `ValueError` of the block into a `DataError`: what it reads is at fault, not the configuration.

    Raises:
        DataError: with the words of an error that has no exit code of its own, and is not about a package.
    """
    try:
        yield
    except ValueError as error:
        if hasattr(error, "exit_code") or isinstance(error.__cause__, ImportError):
            raise
        raise DataError(str(error)) from error


def exit_code(error: BaseException) -> int:
    """64 the configuration, 65 a file or data, 70 numbers that are not finite, 71 memory, 74 a full disk,
    75 a signal, 130 Ctrl-C twice, 1 anything else.

    An error may carry its own `exit_code`. A plain int, which any reader of files takes.
    """
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return int(own)
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("tokenkit"):
        return 1
    if is_out_of_memory(error):
        return int(ExitCode.MEMORY)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return int(ExitCode.DISK)
    kinds: list[tuple[type[BaseException], int]] = [
        (KeyboardInterrupt, ExitCode.INTERRUPTED),
        (ArithmeticError, ExitCode.NUMERICS),
        (UnicodeError, ExitCode.DATA),
        (OSError, ExitCode.DATA),
        (ValueError, ExitCode.CONFIG),
        (ModuleNotFoundError, ExitCode.CONFIG),
    ]
    return next((int(code) for kind, code in kinds if isinstance(error, kind)), 1)


def at_least(name: str, value: float | None, smallest: float, largest: float = math.inf) -> None:
    """Refuse a number below `smallest`, or above `largest`; None passes.

    Raises:
        ConfigError: the value lies outside.
    """
    if value is not None and not smallest <= value <= largest:
        limit = f"at least {smallest}" if value < smallest else f"at most {largest}"
        raise ConfigError(f"{name} must be {limit}, got {value}")


def names_a_folder(name: str, value: str) -> None:
    """Refuse an empty name: as a path it would be the current folder.

    Raises:
        ConfigError: the value is empty.
    """
    if not value.strip():
        raise ConfigError(f"{name} must name a folder, got {value!r}")


def names_a_new_file(name: str, value: str | None) -> None:
    """Refuse an output that exists or cannot be made, before the work whose result it holds.

    Args:
        name: of the option.
        value: the path; None: nothing is written.

    Raises:
        FileExistsError: something is there.
        FileNotFoundError: the folder of the file is not there.
    """
    if value is None:
        return
    path = Path(value).expanduser()
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{name} {value} exists: give another name, or move the file away")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} {value}: the folder {path.parent} does not exist: make it first")


CODE_FILE = "TOKENKIT_CODE_FILE"
"""Variable by which `tokenkit.launch` names a file for the code of a run that ends before it has a folder."""


def leave_code(code: int) -> None:
    """Write an exit code where `tokenkit.launch` looks for it; of several processes the first one's stays."""
    path = os.environ.get(CODE_FILE)
    if path:
        with suppress(OSError), open(path, "x", encoding="ascii") as file:
            file.write(str(int(code)))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `, did you mean X?`, or nothing where no valid name is close."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""
