"""What a configuration may do wrong, and what the process then says to the shell."""

import difflib
from collections.abc import Iterable

EXIT_CONFIG = 64
"""The configuration or the command line is at fault: repeating the run changes nothing."""

EXIT_DATA = 65
"""A file, a data set or a checkpoint is at fault."""

EXIT_NUMERICS = 70
"""The mathematics left the finite numbers: no restart helps."""


class ConfigError(ValueError):
    """The configuration cannot be used. One line: the field, what came, what to do."""

    exit_code = EXIT_CONFIG


def at_least(name: str, value: float | None, smallest: float) -> None:
    """Refuse a number below `smallest`; None passes.

    Raises:
        ConfigError: the value is smaller.
    """
    if value is not None and value < smallest:
        raise ConfigError(f"{name} must be at least {smallest}, got {value}")


def check_parts(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Check a value whose parts are joined with `+`.

    Raises:
        ConfigError: a part is unknown or stands twice.
    """
    parts = value.split("+")
    for part in parts:
        if part not in valid:
            raise ConfigError(
                f"{name}: {part!r} is unknown{nearest(part, valid)}; "
                f"expected {', '.join(valid)}, joined with +"
            )
    if len(set(parts)) < len(parts):
        raise ConfigError(f"{name}: {value!r} names a part twice")


def nearest(name: str, valid: Iterable[str]) -> str:
    """`, did you mean X?`, or nothing where no valid name is close."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""
