"""Read checkpoints without running what is in them.

PyTorch's own reader of distributed checkpoints unpickles `.metadata` and every entry that is not a
tensor, and follows paths out of the folder. Ours unpickles `.metadata` through a list of the few
classes that our writer needs, accepts tensors only, and opens only the regular files whose size and
SHA-256 a manifest names. The manifest proves that a checkpoint is whole, not who wrote it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from tokenkit.disk import NO_LINK
from tokenkit.errors import CheckpointError

MANIFEST = "manifest.json"
METADATA = ".metadata"
FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_METADATA_BYTES = 256 << 20
MAX_RANK_BYTES = 64 << 20

_FILE_NAME = re.compile(r"\.metadata|__\d{1,6}_\d{1,6}\.distcp|rank_\d{5}\.json")
_DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
_PLAN_CLASSES = [
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
]
ALLOWED_GLOBALS = frozenset(
    {("torch", dtype) for dtype in _DTYPES}
    | {("torch.distributed.checkpoint.metadata", name) for name in _PLAN_CLASSES}
    | {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)
_PATH_MODULES = ("pathlib", "pathlib._local")  # Python 3.13 alone pickles paths by the second
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
"""Where DCP once wrote, which nothing reads: paths that cannot open a file, on any system."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a committed checkpoint holds. It is written last: a folder without one was never finished."""

    format: int
    step: int
    world_size: int
    torch: str
    config: dict[str, Any]
    fingerprints: dict[str, str]
    """What the run was made of, by name: tokenizers, models, data."""
    files: dict[str, tuple[int, str]]
    """By name: bytes and SHA-256."""

    def to_json(self) -> str:
        """Return the text of the manifest, with a digest of itself."""
        body = asdict(self)
        return json.dumps({"manifest": body, "sha256": _digest(body)}, indent=1, allow_nan=False)


def _digest(body: Any) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no manifest, or one that is torn, forged by hand or of another format.
    """
    path = folder / MANIFEST
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint: expected a folder, and no link to one")
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{folder} holds no {MANIFEST}: its saving was never finished")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes: not a manifest of ours")
    try:
        return parse_manifest(path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def parse_manifest(text: bytes) -> Manifest:
    """Return the manifest that `text` spells, or raise the error of the first thing that is wrong."""
    document = json.loads(text)
    body = document["manifest"]
    if document["sha256"] != _digest(body):
        raise ValueError("its digest does not match its content")
    if body["format"] != FORMAT:
        raise ValueError(f"its format is {body['format']}, this version of tokenkit reads {FORMAT}")
    files = {name: (_natural(size), str(sha256)) for name, (size, sha256) in body.pop("files").items()}
    manifest = Manifest(files=files, **body)
    if not isinstance(manifest.config, dict) or not isinstance(manifest.fingerprints, dict):
        raise TypeError("its config or fingerprints is not a mapping")
    required = {METADATA} | {
        f"rank_{rank:05d}.json" for rank in range(min(_natural(manifest.world_size), 10**5))
    }
    if not required <= files.keys() or not all(_FILE_NAME.fullmatch(name) for name in files):
        raise ValueError(
            f"its files must include {METADATA} and one rank_*.json per rank, and nothing foreign"
        )
    if any(size > MAX_RANK_BYTES for name, (size, _) in files.items() if name.startswith("rank_")):
        raise ValueError(f"the state of a rank is larger than {MAX_RANK_BYTES} bytes")
    _natural(manifest.step)
    return manifest


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number, got {value!r}")
    return value


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file; a link is an OSError."""
    handle = os.open(path, os.O_RDONLY | NO_LINK)
    with os.fdopen(handle, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, manifest: Manifest, names: Collection[str]) -> str | None:
    """Say what is wrong with the first bad one of the files `names`; None: all are as they were written."""
    for name in names:
        size, sha256 = manifest.files[name]
        path = folder / name
        try:
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing or not a regular file"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if sha256_of(path) != sha256:
                return f"{name} differs from what was written (SHA-256)"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


class _MetadataUnpickler(pickle._Unpickler):
    """The unpickler written in Python: the one in C fills memory where a number in the file tells it to."""

    # the one operation that would do so here too
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if module in _PATH_MODULES and name in _PATHS:
            return _PATHS[name]
        if (module, name) not in ALLOWED_GLOBALS:
            raise CheckpointError(f"{METADATA} asks for {module}.{name}, which no checkpoint needs: refused")
        return super().find_class(module, name)


_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, struct.error, EOFError, AssertionError, AttributeError, ImportError),
    *(LookupError, TypeError, ValueError, OverflowError, MemoryError, RecursionError),
)


def read_metadata(folder: Path, manifest: Manifest) -> Metadata:
    """Return DCP's plan of the tensors in `folder`, checked against the manifest.

    Raises:
        CheckpointError: it names code, entries that are not tensors, or bytes outside the manifest's files.
    """
    path = folder / METADATA
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_METADATA_BYTES} bytes: refused")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        _check_metadata(metadata, manifest)
    except _UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return metadata


def _check_metadata(metadata: Any, manifest: Manifest) -> None:
    if not isinstance(metadata, Metadata):
        raise TypeError(f"expected the plan of a checkpoint, got {type(metadata).__name__}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"entry {name!r} of {METADATA} is not a tensor: refused")
    for index, info in metadata.storage_data.items():
        if info.relative_path not in manifest.files:
            raise CheckpointError(
                f"{METADATA} points to {info.relative_path!r}, which the manifest does not list: refused"
            )
        if info.transform_descriptors:
            raise CheckpointError(f"entry {index.fqn!r} of {METADATA} is transformed: refused")
        size = manifest.files[info.relative_path][0]
        if not 0 <= info.offset <= info.offset + info.length <= size:
            raise CheckpointError(f"entry {index.fqn!r} of {METADATA} lies outside its file: refused")
        _check_chunk(index, info.length, metadata.state_dict_metadata)


def _check_chunk(index: Any, length: int, entries: Mapping[str, Any]) -> None:
    """A chunk that declares more than its bytes could hold is a bomb."""
    entry = entries[index.fqn]
    declared = [math.prod(chunk.sizes) for chunk in entry.chunks if chunk.offsets == index.offset]
    itemsize = torch.empty(0, dtype=entry.properties.dtype).element_size()
    if any(count * itemsize > length for count in declared):
        raise CheckpointError(
            f"entry {index.fqn!r} of {METADATA} declares more than its {length} bytes: refused"
        )


class SafeReader(FileSystemReader):
    """DCP's file reader over a plan that was read safely, once."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked plan; nothing is unpickled here."""
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner for a flat mapping of names to tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse: our checkpoints hold tensors, everything else is in JSON files."""
        raise CheckpointError(f"entry {read_item.dest_index.fqn!r} is a pickled object: refused")


def reader_and_planner(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Return the arguments that make `torch.distributed.checkpoint.load` safe."""
    return {"storage_reader": SafeReader(folder, metadata), "planner": SafePlanner()}
