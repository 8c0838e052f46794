"""What tells whether data is still what it was: sizes, times and digests of files, digests of rows."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WHOLE_BYTES = 4 * 2**30  # a data set up to this size is read whole: some seconds
_WINDOW = 2**20  # bytes of each piece that is read of a larger one
_SAMPLED_ROWS = 256

Stamp = tuple[int, int]
"""Bytes of a file, and when it was written, in nanoseconds."""


def stamp(path: Path) -> Stamp:
    """Return what changes when a file is written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_fingerprint(files: Sequence[Path], whole_bytes: int = WHOLE_BYTES) -> dict[str, Any]:
    """Return number, size and digest of files, whatever their names are; JSON.

    Args:
        files: in the order in which they are read.
        whole_bytes: of files that are larger together only evenly spaced pieces are read, of so many bytes
            in all: a change between them is seen only if a file's size changes.
    """
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    digest = hashlib.sha256()
    step = max(1, total // max(1, whole_bytes))
    for path, size in zip(files, sizes, strict=True):
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start in range(0, size, step * _WINDOW):
                file.seek(start)
                digest.update(file.read(_WINDOW))
    return {"files": len(files), "bytes": total, "digest": digest.hexdigest()}


def rows_fingerprint(rows: Any) -> dict[str, Any]:
    """Return a digest of some rows of a table, evenly spaced, or of the first rows of a stream; JSON."""
    chosen: Iterable[Any]
    if hasattr(rows, "__len__"):
        count = len(rows)
        chosen = (rows[i] for i in range(0, count, max(1, count // _SAMPLED_ROWS)))
    else:
        count, chosen = 0, itertools.islice(rows, _SAMPLED_ROWS)
    digest = hashlib.sha256()
    for row in chosen:
        digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return {"rows": count, "digest": digest.hexdigest()}
