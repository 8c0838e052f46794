"""Local files: which of a folder are data, of what format and split, and the rows that each holds.

A reader yields one mapping per row, in the order of the file, or a `BadRow` where a row cannot be read:
the row keeps its place, so the number of every other row stays what it was. Bytes that are not UTF-8
become lone surrogates, which no document may hold; `sources.py` refuses them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tokenkit.data.json_values import Value, begins_values, read_value, values_of
from tokenkit.data.opening import PACKED, UNREAD_PACKING, opened, too_large
from tokenkit.data.options import BadRowOptions

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Splits, and the words that name each in the name of a file or of its folder."""

_ASIDE = frozenset(  # what Hugging Face writes beside data
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
_WORD = re.compile("[a-z]+")
_NAME = re.compile(r"[\w.-]+")


def format_of(path: Path) -> str | None:
    """Return the format that a file's ending names; None: it names none."""
    name = path.name.lower()
    if path.suffix.lower() in PACKED:
        name = name[: -len(path.suffix)]
    found = FORMATS.get(Path(name).suffix)
    is_packed = name != path.name.lower()
    return None if is_packed and found in ("parquet", "arrow") else found


def data_files(path: Path) -> list[Path]:
    """Return the file itself, or every data file below a folder in the order of their names.

    Raises:
        FileNotFoundError: if there is nothing, or no data file.
        ValueError: if a data file is packed in a way that is not read.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"data path {path} does not exist: give a file, a folder or the name of a data set"
        )
    shown = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    for file in shown:
        if file.suffix.lower() in UNREAD_PACKING and format_of(file.with_suffix("")) is not None:
            raise ValueError(
                f"{file} is packed in a way that is not read ({', '.join(PACKED)} are): unpack it, or move "
                "it out of the folder"
            )
    files = [file for file in shown if format_of(file) is not None and file.name not in _ASIDE]
    if not files:
        raise FileNotFoundError(
            f"folder {path} holds no data file: expected an ending of {', '.join(FORMATS)}, or one of "
            f"{', '.join(PACKED)} behind it"
        )
    return files


def files_of_split(path: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the data files of a split, and those that are left alone because they are of others.

    A split is named by a word in the name of a file, or else of a folder below `path`. A file that names none
    belongs to `train`. One file alone is read whatever it is called, unless another split is asked for.

    Raises:
        FileNotFoundError: if there is no data file.
        ValueError: if no file is of the split.
    """
    files = data_files(path)
    names = [file.relative_to(path) if path.is_dir() else Path(file.name) for file in files]
    usual = next((known for known, words in SPLITS.items() if split.lower() in words), None)
    if path.is_file() and usual == "train":
        return files, []
    if usual is not None:
        chosen = [_split(name) == usual or (usual == "train" and _split(name) is None) for name in names]
    else:
        words = _WORD.findall(split.lower()) if _NAME.fullmatch(split) else []  # no slice, no sum
        chosen = [_holds(name, words) for name in names]
    if not any(chosen):
        there = sorted({_split(name) or "train" for name in names})
        what = "folder" if path.is_dir() else "file"
        raise ValueError(
            f"{what} {path} has no split {split!r}: the names of its files say {', '.join(there)} (train "
            "where they say none); set split to one that is there, or name the file itself"
        )
    pairs = list(zip(files, chosen, strict=True))
    return [file for file, is_chosen in pairs if is_chosen], [
        file for file, is_chosen in pairs if not is_chosen
    ]


def _split(name: Path) -> str | None:
    """Return the split that the name of a file says, or else that of the nearest folder."""
    for part in reversed(name.parts):
        for word in _WORD.findall(part.lower()):
            for split, words in SPLITS.items():
                if word in words:
                    return split
    return None


def _holds(name: Path, words: Sequence[str]) -> bool:
    own = _WORD.findall(name.as_posix().lower())
    size = len(words)
    return size > 0 and any(own[start : start + size] == list(words) for start in range(len(own) - size + 1))


Row = Mapping[str, Any]

DOCUMENT_END = b"<|endoftext|>"  # a line that holds nothing else separates the documents of a text file
_JSON_ESCAPES = 4  # a character of text takes up to four times its bytes in JSON, with room for other fields
_ARROW_ROWS = 64  # that are unpacked at once: a small file may hold huge rows


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read, and why."""

    reason: str
    place: str = field(default="", compare=False)
    """File and line, for a message."""


def read_rows(path: Path, format_name: str | None, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    """Yield the rows of one file, in memory that does not depend on its size (json: one file at a time).

    Args:
        path: a file, which may be packed.
        format_name: one of `options.Format`; None: by the file's ending.
        limits: largest row and file.

    Raises:
        ValueError: if the format is unknown, or the file is damaged or too large.
    """
    format_name = format_name or format_of(path)
    if format_name not in _READERS:
        raise ValueError(
            f"{path} has no known format: expected an ending of {', '.join(FORMATS)} (all but parquet and "
            f"arrow also with {', '.join(PACKED)} behind it), or the option 'format'"
        )
    yield from _READERS[format_name](path, limits)


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
    with opened(path, limits.max_file_bytes) as file:
        marked = any(
            line is not None and line.rstrip(b"\r\n") == DOCUMENT_END
            for line in _lines(file, limits.max_row_bytes)
        )
    lines: list[bytes] = []
    first, size = 1, 0
    with opened(path, limits.max_file_bytes) as file:
        for number, line in enumerate(_lines(file, limits.max_row_bytes), 1):
            content = None if line is None else line.rstrip(b"\r\n")
            if content is not None and (content == DOCUMENT_END if marked else not content.strip()):
                yield from _document(lines, size, limits.max_row_bytes, f"{path} line {first}")
                lines, first, size = [], number + 1, 0
                continue
            size += limits.max_row_bytes + 1 if line is None else len(line)
            if line is not None and size <= limits.max_row_bytes:
                lines.append(line)
    yield from _document(lines, size, limits.max_row_bytes, f"{path} line {first}")


def _document(lines: list[bytes], size: int, max_bytes: int, place: str) -> Iterator[Row | BadRow]:
    if size > max_bytes:
        yield BadRow("too long", place)
        return
    text = b"".join(lines).strip(b"\r\n")
    if text.strip():
        yield {"text": _text(text)}


def _jsonl_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    """One object per line, unless the file is a list, or its first object takes several lines."""
    max_bytes = _JSON_ESCAPES * limits.max_row_bytes
    with opened(path, limits.max_file_bytes) as file:
        lines = enumerate(_lines(file, max_bytes), 1)
        first = next(((number, line) for number, line in lines if line is None or line.strip()), None)
        if first is None:
            return
        if isinstance(_line_row(path, *first), dict) or (rows := _unlined_rows(path, limits)) is None:
            for number, line in chain([first], lines):
                if line is None or line.strip():
                    yield _line_row(path, number, line)
            return
    yield from rows


def _unlined_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow] | None:
    """Return the rows of a file whose JSON does not keep to lines; None where its beginning shows no such."""
    with opened(path, limits.max_file_bytes) as file:
        head = _text(file.read(_JSON_ESCAPES * limits.max_row_bytes))
    return _whole_rows(path, limits) if begins_values(head) else None


def _line_row(path: Path, number: int, line: bytes | None) -> Row | BadRow:
    if line is None:
        return BadRow("too long", f"{path} line {number}")
    return _as_row(path, read_value(_text(line), f"line {number}"))


def _as_row(path: Path, value: Value) -> Row | BadRow:
    if value.reason is None and isinstance(value.value, dict):
        return value.value
    return BadRow(value.reason or "not a JSON object", f"{path} {value.place}")


def _json_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow]:
    """A list of objects, an object that holds one under `data`, or objects one behind the other."""
    rows = _whole_rows(path, limits)
    if rows is not None:
        yield from rows
        return
    with opened(path, limits.max_file_bytes) as file:
        found = [
            _line_row(path, number, line)
            for number, line in enumerate(_lines(file, _JSON_ESCAPES * limits.max_row_bytes), 1)
            if line is None or line.strip()
        ]
    if all(isinstance(row, BadRow) for row in found):
        raise ValueError(
            f"{path} is not JSON, nor does it hold a JSON object on some line: mend or replace it"
        )
    yield from found


def _whole_rows(path: Path, limits: BadRowOptions) -> Iterator[Row | BadRow] | None:
    """Return the rows of a file whose JSON does not keep to lines; None if it begins with no such value."""
    with opened(path, limits.max_file_bytes) as file:
        values = values_of(_text(file.read()))
    return None if values is None else (_as_row(path, value) for value in values)


def _csv_rows(path: Path, limits: BadRowOptions, delimiter: str = ",") -> Iterator[Row | BadRow]:
    csv.field_size_limit(limits.max_row_bytes)  # the module's own 128 KiB are shorter than many documents
    with opened(path, limits.max_file_bytes) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, delimiter=delimiter)
        try:
            for row in reader:
                place = f"{path} line {reader.line_num}"
                yield BadRow("more fields than the header", place) if None in row else row
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV: {error} at line {reader.line_num}") from error


def _parquet_rows(path: Path, limits: BadRowOptions) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
            if sum(group.total_byte_size for group in groups) > limits.max_file_bytes:
                raise too_large(path, limits.max_file_bytes)
            yield from _batch_rows(path, file.iter_batches(batch_size=_ARROW_ROWS), limits)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _arrow_rows(path: Path, limits: BadRowOptions) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                batches: Any = pa.ipc.open_stream(file)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            yield from _batch_rows(path, batches, limits)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Arrow file: {error}") from error


def _batch_rows(path: Path, batches: Any, limits: BadRowOptions) -> Iterator[Row]:
    left = limits.max_file_bytes
    for batch in batches:
        for start in range(0, batch.num_rows, _ARROW_ROWS):
            part = batch.slice(start, _ARROW_ROWS)
            left -= part.nbytes
            if left < 0:
                raise too_large(path, limits.max_file_bytes)
            yield from part.to_pylist()


_READERS: dict[str, Callable[[Path, BadRowOptions], Iterator[Row | BadRow]]] = {
    "txt": _text_rows,
    "text": _text_rows,
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "tsv": partial(_csv_rows, delimiter="\t"),
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}
