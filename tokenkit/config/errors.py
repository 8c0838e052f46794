"""What a configuration may do wrong, and what the process then says to the shell."""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CONFIG = 64
"""The configuration or the command line is at fault: repeating the run changes nothing."""

EXIT_DATA = 65
"""A file, a data set or a checkpoint is at fault."""

EXIT_NUMERICS = 70
"""The mathematics left the finite numbers: no restart helps."""

EXIT_MEMORY = 71
"""Memory ran out: something must be made smaller."""

EXIT_DISK = 74
"""A disk is full, or would not take what was written."""

EXIT_STOPPED = 75
"""Stopped from outside: starting again with --resume goes on."""

EXIT_INTERRUPTED = 130
"""Stopped from the keyboard, at once."""

MEMORY_REMEDY = (
    "lower max_length_new and max_length_teacher, raise gradient_accumulation_steps (fewer documents at a "
    "time), turn gradient_checkpointing on, train adapters (train_model_mode lora), or share the run among "
    "more processes; --resume goes on from the last checkpoint where these fields move no number"
)


class ConfigError(ValueError):
    """The configuration cannot be used. One line: the field, what came, what to do."""

    exit_code = EXIT_CONFIG


class DataError(ValueError):
    """A file, a data set, a tokenizer or a model cannot be used. One line: which, why, what to do."""

    exit_code = EXIT_DATA


class StoppedError(KeyboardInterrupt):
    """A signal asked the process to end, where there was nothing to save first.

    As an interruption it passes through those who catch every `Exception`.
    """

    exit_code = EXIT_STOPPED


class SilenceError(RuntimeError):
    """Somebody whom the run waits for is gone or does nothing. The words say who, and since when."""

    exit_code = 1
    is_told = True
    """One line says it all: a traceback would show who waited, not who failed."""
    is_own = False
    """It is this process that hangs."""


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

    An error may carry its own `exit_code`.
    """
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("tokenkit"):
        return 1
    if is_out_of_memory(error):
        return EXIT_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return EXIT_DISK
    kinds: list[tuple[type[BaseException], int]] = [
        (KeyboardInterrupt, EXIT_INTERRUPTED),
        (ArithmeticError, EXIT_NUMERICS),
        (UnicodeError, EXIT_DATA),
        (OSError, EXIT_DATA),
        (ValueError, EXIT_CONFIG),
        (ModuleNotFoundError, EXIT_CONFIG),
    ]
    return next((code for kind, code in kinds if isinstance(error, kind)), 1)


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
