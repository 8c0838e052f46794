"""Rows of local files: txt, jsonl, json, csv (also .gz) and parquet.

A reader yields one mapping per row, in the order of the file, or a `BadRow` where a row cannot be read:
the row keeps its place, so the number of every other row stays what it was. Bytes that are not UTF-8
become lone surrogates, which no document may hold; `rows.py` refuses them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tokenkit.data.options import BadRowOptions

Row = Mapping[str, Any]

DOCUMENT_END = b"<|endoftext|>"  # a line that holds nothing else separates the documents of a text file
_SUFFIXES = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
_JSON_ESCAPES = 4  # a character of text takes up to four times its bytes in JSON, with room for other fields
_MAX_GZIP_RATIO = 100  # text shrinks 3 to 20 times; an archive made to fill the memory, 1000 times
_SMALL_FILE = 2**24  # bytes that any archive may hold


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read, and why."""

    reason: str


def data_files(path: Path) -> list[Path]:
    """Return the file itself, or every data file below a folder in the order of their names.

    Raises:
        FileNotFoundError: if there is nothing, or no data file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"data path {path} does not exist: give a file, a folder or the name of a data set"
        )
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and format_of(file) is not None
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"folder {path} holds no data file: expected an ending of {', '.join(_SUFFIXES)}, or .gz of these"
        )
    return files


def format_of(path: Path) -> str | None:
    """Return the format that a file's ending names; None: it names none."""
    name = path.name.lower().removesuffix(".gz")
    return _SUFFIXES.get(Path(name).suffix)


def read_rows(path: Path, format_name: str | None, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    """Yield the rows of one file, in memory that does not depend on its size (json: one file at a time).

    Args:
        path: a file; one that ends in `.gz` is decompressed.
        format_name: `txt`, `jsonl`, `json`, `parquet` or `csv`; None: by the file's ending.
        limits: largest row and file.

    Raises:
        ValueError: if the format is unknown, or the file is damaged or too large.
    """
    format_name = format_name or format_of(path)
    if format_name == "parquet":
        yield from _parquet_rows(path)
        return
    if format_name not in _READERS:
        raise ValueError(
            f"{path} has no known format: expected an ending of {', '.join(_SUFFIXES)} (or .gz of these), "
            "or the option 'format'"
        )
    try:
        yield from _READERS[format_name](path, limits)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch or compress it again") from error


class _Capped(io.RawIOBase):
    """A file that refuses to give more than a number of bytes: a small archive may hold a huge one."""

    def __init__(self, file: IO[bytes], path: Path, max_bytes: int) -> None:
        super().__init__()
        self._file, self._path, self._max_bytes = file, path, max_bytes
        self._left = max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._path} holds more than {self._max_bytes} bytes: raise data.bad_rows.max_file_bytes, "
                f"or decompress a .gz that really shrank more than {_MAX_GZIP_RATIO} times"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path, max_bytes: int) -> io.BufferedReader:
    if path.name.lower().endswith(".gz"):
        max_bytes = min(max_bytes, max(_SMALL_FILE, _MAX_GZIP_RATIO * path.stat().st_size))
        file = cast("IO[bytes]", gzip.open(path))  # noqa: SIM115, closed with the reader around it
    else:
        file = path.open("rb")
    return io.BufferedReader(_Capped(file, path, max_bytes), 2**20)


def _lines(file: io.BufferedReader, max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a file; None for one that is longer than `max_bytes`."""
    while line := file.readline(max_bytes):
        if len(line) < max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
            pass
        yield None


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")


def _text_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    """Documents between `<|endoftext|>` lines where the file has such a line, else between blank lines."""
    with _open(path, limits.max_file_bytes) as file:
        marked = any(
            line is not None and line.rstrip(b"\r\n") == DOCUMENT_END
            for line in _lines(file, limits.max_row_bytes)
        )
    lines: list[bytes] = []
    size = 0
    with _open(path, limits.max_file_bytes) as file:
        for line in _lines(file, limits.max_row_bytes):
            content = None if line is None else line.rstrip(b"\r\n")
            if content is not None and (content == DOCUMENT_END if marked else not content.strip()):
                yield from _document(lines, size, limits.max_row_bytes)
                lines, size = [], 0
                continue
            size += limits.max_row_bytes + 1 if line is None else len(line)
            if line is not None and size <= limits.max_row_bytes:
                lines.append(line)
    yield from _document(lines, size, limits.max_row_bytes)


def _document(lines: list[bytes], size: int, max_bytes: int) -> Iterator[Row | BadRow]:
    if size > max_bytes:
        yield BadRow("too long")
        return
    text = b"".join(lines).strip(b"\r\n")
    if text.strip():
        yield {"text": _text(text)}


def _jsonl_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    with _open(path, limits.max_file_bytes) as file:
        for line in _lines(file, _JSON_ESCAPES * limits.max_row_bytes):
            if line is None:
                yield BadRow("too long")
            elif line.strip():
                yield _json_row(line)


def _json_row(line: bytes) -> Row | BadRow:
    try:
        return _as_row(json.loads(_text(line)))
    except (json.JSONDecodeError, RecursionError):
        return BadRow("not JSON")


def _as_row(value: object) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow("not a JSON object")


def _json_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    """A list of objects, an object that holds one under `data`, or one object per line."""
    with _open(path, limits.max_file_bytes) as file:
        text = _text(file.read())
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        rows = list(_jsonl_rows(path, limits))
        if any(not isinstance(row, BadRow) for row in rows):
            yield from rows
            return
        raise ValueError(
            f"{path} is not JSON, nor does it hold a JSON object on some line: {error}; mend or replace it"
        ) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    for item in value if isinstance(value, list) else [value]:
        yield _as_row(item)


def _csv_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    csv.field_size_limit(limits.max_row_bytes)  # the module's own 128 KiB are shorter than many documents
    with _open(path, limits.max_file_bytes) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text)
        try:
            for row in reader:
                yield BadRow("more fields than the header") if None in row else row
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV: {error} at line {reader.line_num}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, BadRowOptions], Iterator[Row | BadRow]]] = {
    "txt": _text_rows,
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
}
