"""Where the rows of a data set are, and whether they are still what they were.

Files of this machine, a saved `datasets` folder, or the hub.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenkit.data.files import SPLITS, BadRow, Row, files_of_split, format_of, read_rows
from tokenkit.data.options import BadRowOptions, SourceOptions

logger = logging.getLogger(__name__)

WHOLE_BYTES = 4 * 2**30  # a data set up to this size is read whole: some seconds
_WINDOW = 2**20  # bytes of each piece that is read of a larger one
_SAMPLED_ROWS = 256

Stamp = tuple[int, int]
"""Bytes of a file, and when it was written, in nanoseconds."""

Rows = Iterator[Row | BadRow] | Sequence[Row]


class Place:
    """One data set where it lies."""

    def __init__(self, rows: Callable[[int], Rows], files: Sequence[Path] = ()) -> None:
        """`rows` gives those from a number on, again at every call; `files` hold them, if they are local."""
        self.rows, self.files = rows, list(files)
        self._fingerprint: dict[str, Any] | None = None
        self._stamps: dict[Path, Stamp] = {file: _stamp(file) for file in self.files}

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this data from data that was changed; JSON. The first call reads the files."""
        if self._fingerprint is None:
            self._fingerprint = (
                files_fingerprint(self.files) if self.files else _rows_fingerprint(self.rows(0))
            )
        return self._fingerprint

    def check_unchanged(self, file: Path) -> None:
        """Refuse a file that was written since the data set was opened.

        Raises:
            ValueError: it was; its content is another, or nothing tells that it is not.
        """
        try:
            now: Stamp | None = _stamp(file)
        except FileNotFoundError:
            now = None
        then = self._stamps[file]
        if now == then:
            return
        is_same_size = now is not None and now[0] == then[0]
        if (
            is_same_size
            and self._fingerprint is not None
            and files_fingerprint(self.files) == self._fingerprint
        ):
            self._stamps = {path: _stamp(path) for path in self.files}
            return
        size = "is gone" if now is None else f"has {now[0]:,} bytes"
        raise ValueError(
            f"{file} changed while it was in use: it had {then[0]:,} bytes when it was opened, and {size}"
            f"{' and another time' if is_same_size else ''} now; restore it and resume, or start a new run"
        )


def place_of(options: SourceOptions, limits: BadRowOptions) -> Place:
    """Find the data of a data set.

    Raises:
        FileNotFoundError: a path that leads nowhere, or a name that the hub does not have.
        ValueError: files of no known format, or without the split.
    """
    path = Path(options.location).expanduser()
    if not is_local(options.location):
        return Place(_hub(options))
    if options.subset is not None:
        raise ValueError(
            f"{path} is a path, and only data sets of the hub have configurations: got {options.subset!r}; "
            "leave subset (dataset_config_name) out, and name the folder or file that is meant"
        )
    if is_saved(path):
        return _saved_place(path, options)
    files, others = files_of_split(path, options.split)
    if others:
        logger.warning(
            "data set %s: %d of %d files are of other splits than %r and are left alone",
            path, len(others), len(files) + len(others), options.split,
        )  # fmt: skip
    for file in files:
        if options.format is None and format_of(file) is None:
            next(read_rows(file, None, limits))  # raises: names the formats
    return _local_place(files, options.format, limits)


def _local_place(files: Sequence[Path], format_name: str | None, limits: BadRowOptions) -> Place:
    def rows(start: int) -> Iterator[Row | BadRow]:
        return itertools.islice(itertools.chain.from_iterable(map(read, files)), start, None)

    def read(file: Path) -> Iterator[Row | BadRow]:
        place.check_unchanged(file)
        yield from read_rows(file, format_name, limits)
        place.check_unchanged(file)

    place = Place(rows, files)
    return place


def is_local(location: str) -> bool:
    """Whether a data set is a path: it exists, or looks like nothing that the hub could hold."""
    path = Path(location).expanduser()
    has_ending = format_of(path) is not None
    return path.exists() or location.startswith((".", "~", "/")) or has_ending or location.count("/") > 1


def is_saved(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` of `datasets` writes."""
    is_one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return is_one or (path / "dataset_dict.json").is_file()


def _saved_place(path: Path, options: SourceOptions) -> Place:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable folder of save_to_disk: {_first_line(error)}") from error
    usual = next((known for known, words in SPLITS.items() if options.split.lower() in words), options.split)
    if isinstance(data, datasets.DatasetDict):
        name = next((name for name in (options.split, usual) if name in data), None)
        if name is None:
            raise ValueError(
                f"{path} has no split {options.split!r}: it has {', '.join(data)}; set split to one of them"
            )
        data = data[name]
    elif usual != "train" and str(data.split) not in (options.split, usual):
        raise ValueError(
            f"{path} is one data set, without a split {options.split!r} (its split is {data.split}): leave "
            "split out"
        )
    files = [Path(entry["filename"]) for entry in data.cache_files]
    if not options.streaming:
        return Place(lambda start: data, files)
    return Place(lambda start: (data[i] for i in range(start, len(data))), files)


def _hub(options: SourceOptions) -> Callable[[int], Rows]:
    import datasets

    try:
        data = datasets.load_dataset(
            options.location, options.subset, split=options.split, streaming=options.streaming
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"data set {options.location!r} is neither a local path nor could it be loaded from the hub: "
            f"{_first_line(error)}; check the name, subset={options.subset!r} and split={options.split!r}"
        ) from error
    if options.streaming:
        return lambda start: iter(data.skip(start))
    return lambda start: data


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _stamp(path: Path) -> Stamp:
    """Return what changes when a file is written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


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


def _rows_fingerprint(rows: Any) -> dict[str, Any]:
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


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
