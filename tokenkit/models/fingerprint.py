"""A digest of a pretrained model that costs no reading of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

_HEAD = 1 << 20  # bytes: the header of a safetensors file, names and shapes
_BLOCKS, _BLOCK = 64, 4096  # of the weights themselves, spread evenly: training moves all of them


def model_fingerprint(name_or_path: str, commit: str | None) -> str:
    """Return what tells two base models apart, for checkpoints that hold only what was trained.

    Args:
        name_or_path: a folder, whose configuration, names and sizes of weight files, their headers and a
            sample of their contents make the digest (SHA-256, hex); or a name on the hub.
        commit: of the hub's repository, which says it all; the digest of a folder does not need it.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return f"commit {commit}"
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD))
            for block in range(_BLOCKS if size > _HEAD else 0):
                file.seek(_HEAD + (size - _HEAD) * block // _BLOCKS)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
