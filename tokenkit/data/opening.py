"""A file's bytes as every reader wants them: unpacked, in UTF-8, with line feeds, and no more than allowed.

What a file is packed with is read from its first bytes, not from its name. UTF-16 and UTF-32 are known by
their byte order mark. Line ends that are carriage returns alone become line feeds.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
UNREAD_PACKING = (
    ".7z",
    ".br",
    ".lz4",
    ".lzma",
    ".lzo",
    ".rar",
    ".snappy",
    ".sz",
    ".tar",
    ".tgz",
    ".z",
    ".zip",
)
MAX_RATIO = 100  # text shrinks 3 to 20 times; an archive made to fill the memory, 1000 times
SMALL_FILE = 2**24  # bytes that any archive may hold

_BUFFER = 2**20
_HEAD = 2**16  # bytes that tell how lines end
_SIGNATURES = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
_REFUSED = {
    re.compile(rb"PK(\x03\x04|\x05\x06)"): "a zip archive: unpack it",
    re.compile(rb"7z\xbc\xaf\x27\x1c"): "a 7z archive: unpack it",
    re.compile(rb"\x04\x22\x4d\x18"): "packed with lz4: unpack it, or pack it with gzip or zstd",
    re.compile(rb"Rar!\x1a\x07"): "a rar archive: unpack it",
    re.compile(rb".{257}ustar", re.DOTALL): "a tar archive: unpack it",
    re.compile(rb"version https://git-lfs"): "a pointer of Git LFS, not the file itself: run `git lfs pull`",
    re.compile(rb"PAR1[\x00-\x19]"): "a parquet file: name it .parquet",
    re.compile(rb"ARROW1\x00\x00|\xff{4}..\x00\x00", re.DOTALL): "an Arrow file: name it .arrow",
}
_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def opened(path: Path, max_bytes: int) -> Iterator[io.BufferedReader]:
    """Open a file of text for reading.

    Args:
        path: the file; it may be packed with gzip, bzip2, xz or Zstandard.
        max_bytes: of its unpacked content; reading more is an error.

    Raises:
        ValueError: also while it is read: the file is damaged, too large, or known to be of another kind.
    """
    with path.open("rb") as raw:
        head = raw.read(_HEAD)
        raw.seek(0)
        packing = next((name for name, start in _SIGNATURES.items() if start.match(head)), None)
        if packing is not None:
            max_bytes = min(max_bytes, max(SMALL_FILE, MAX_RATIO * path.stat().st_size))
        try:
            file = _Capped(raw if packing is None else _unpacked(raw, packing), path, max_bytes)
            yield _as_text(io.BufferedReader(file, _BUFFER), path)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise _damaged(path, error) from error
        except OSError as error:
            if packing is None or error.errno is not None:
                raise
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged: {error}; fetch or compress it again")


def _unpacked(raw: IO[bytes], packing: str) -> IO[bytes]:
    if packing == "gzip":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    if packing == "bz2":
        return cast("IO[bytes]", bz2.BZ2File(raw))
    if packing == "xz":
        return cast("IO[bytes]", lzma.LZMAFile(raw))
    import pyarrow as pa

    return cast("IO[bytes]", pa.CompressedInputStream(raw, "zstd"))


def _as_text(file: io.BufferedReader, path: Path) -> io.BufferedReader:
    """Return the file behind its byte order mark, in UTF-8 and with line feeds."""
    head = file.peek(_HEAD)[:_HEAD]
    for start, name in _REFUSED.items():
        if start.match(head):
            raise ValueError(f"{path} is {name}")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        head = head[len(codecs.BOM_UTF8) :]
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if encoding is not None:
        file = io.BufferedReader(_Recoded(file, encoding, path), _BUFFER)
        head = file.peek(_HEAD)[:_HEAD]
    elif _lacks_a_mark(head):
        raise ValueError(
            f"{path} looks like UTF-16 or UTF-32 without a byte order mark (every other byte is 0): "
            "save it as UTF-8"
        )
    if b"\r" in head.rstrip(b"\r") and b"\n" not in head:
        file = io.BufferedReader(_Recoded(file, "latin-1", path), _BUFFER)
    return file


def _lacks_a_mark(head: bytes) -> bool:
    """Whether text begins as ASCII does in UTF-16: a zero beside each of the first characters."""
    start = head[:64]
    sides = start[::2], start[1::2]
    zeros = [side.count(0) for side in sides]
    return len(start) >= 8 and max(zeros) >= 0.9 * len(sides[1]) and min(zeros) <= 0.7 * len(sides[1])


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
            raise too_large(self._path, self._max_bytes)
        buffer[: len(data)] = data
        return len(data)


class _Recoded(io.RawIOBase):
    """A file of another encoding as UTF-8, with line feeds; as Latin-1 its bytes stay as they are."""

    def __init__(self, file: io.BufferedReader, encoding: str, path: Path) -> None:
        super().__init__()
        errors = "strict" if encoding == "latin-1" else "surrogatepass"
        self._file, self._path = file, path
        self._decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder(encoding)(errors), translate=True
        )
        self._target = "latin-1" if encoding == "latin-1" else "utf-8"
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        is_end = False
        while not self._rest and not is_end:
            data = self._file.read1(_BUFFER)
            is_end = not data
            try:
                text = self._decoder.decode(data, final=is_end)
            except UnicodeDecodeError as error:
                raise ValueError(f"{self._path} is damaged: {error}; save it as UTF-8") from error
            self._rest = text.encode(self._target, "surrogatepass")
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def too_large(path: Path, max_bytes: int) -> ValueError:
    """Return the error of a file that holds more than it may."""
    return ValueError(
        f"{path} holds more than {max_bytes} bytes: raise data.bad_rows.max_file_bytes, "
        f"or unpack a file that really shrank more than {MAX_RATIO} times"
    )
