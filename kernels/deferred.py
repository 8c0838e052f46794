"""What a GPU finds wrong, said where the host waits for it anyway.

    CPU    require(fine_N, ...) reads the answer and raises at once, with the row
    GPU    require(fine_N, ...) keeps a flag on the device; `raise_found` reads it, and raises the same error

An assertion of the device would end the process's CUDA context: no error that a caller can catch, no last
checkpoint, other ranks that wait. Until the flags are read, results are NaN or of ids clamped into range, so
whoever updates parameters reads them first: `training/step.py` reads them with the numbers of its report.
A trainer of one's own calls `raise_found()` before it updates.

TOKENKIT_DEVICE_ASSERTS=1 brings the assertion back, for a debugger: it stops where the fault is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

ASSERTS = os.environ.get("TOKENKIT_DEVICE_ASSERTS") == "1"
"""Assert on the device."""

MOST = 64  # different messages; later ones share the last flag

_kinds: dict[tuple[str, type[Exception]], int] = {}
_flags: dict[torch.device, Tensor] = {}


def waits(tensor: Tensor) -> bool:
    """Say whether the host may read `tensor` at once."""
    return not tensor.is_cuda


def require(
    fine_N: Tensor,
    words: str,
    kind: type[Exception],
    error: Callable[[int], Exception] | None = None,
    first: int = 0,
) -> None:
    """Raise, or note, that a row is not as it must be.

    Args:
        fine_N: bool, by row; or one for all.
        words: what must hold.
        kind: the error.
        error: makes the error of the first row that is not fine, where the host may look; None: of `words`.
        first: what row 0 is called.
    """
    if torch.compiler.is_compiling():  # a graph neither reads nor notes; operations look again inside
        return
    if not fine_N.numel():  # of no row nothing can be wrong
        return
    if waits(fine_N):
        if bool(fine_N.all()):
            return
        row = int((~fine_N.reshape(-1)).nonzero()[0])
        raise kind(words) if error is None else error(row)
    if ASSERTS:
        torch._assert_async(fine_N.all(), words)
        return
    slot = min(_kinds.setdefault((words, kind), len(_kinds)), MOST - 1)
    wrong_N = ~fine_N.reshape(-1)
    found = torch.where(wrong_N.any(), wrong_N.to(torch.uint8).argmax() + (1 + first), 0)
    flags = _flags.get(fine_N.device)
    if flags is None:
        _flags[fine_N.device] = flags = torch.zeros(MOST, dtype=torch.float64, device=fine_N.device)
    flags[slot] = torch.maximum(flags[slot], found.to(flags.dtype))


def take(device: torch.device) -> Tensor:
    """Return the flags of a device, float64 [64], and begin anew; without a wait. For `raise_found`."""
    flags = _flags.pop(device, None)
    return torch.zeros(MOST, dtype=torch.float64, device=device) if flags is None else flags


def found(values: Iterable[float], kind: type[Exception], *, with_rows: bool = True) -> Exception | None:
    """Return the first error of a kind (or of one that inherits from it) that was noted.

    Args:
        values: the flags, as the host read them.
        kind: which errors are meant.
        with_rows: the flags are one process's; those of several were added up, and tell no row.
    """
    names = [name for name, _ in sorted(_kinds.items(), key=lambda item: item[1])]
    for i, value in enumerate(values):
        if not value:
            continue
        words, which = names[i % MOST] if i % MOST < len(names) else ("a tensor is not as it must be", kind)
        if issubclass(which, kind):
            return which(f"{words}: row {int(value) - 1}" if with_rows else words)
    return None


def raise_found(values: Iterable[float] | None = None, *, with_rows: bool = True) -> None:
    """Raise the first error that was noted.

    Args:
        values: the flags, as the host read them; None: those of every device are read here, which waits.
        with_rows: as in `found`.

    Raises:
        ValueError: or what else `require` was given, as on a CPU.
    """
    if values is None:
        values = [value for device in list(_flags) for value in take(device).tolist()]
    error = found(values, Exception, with_rows=with_rows)
    if error is not None:
        raise error
