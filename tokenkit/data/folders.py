"""Which files of a folder are data, of what format, and of which split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenkit.data.opening import PACKED, UNREAD_PACKING

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
