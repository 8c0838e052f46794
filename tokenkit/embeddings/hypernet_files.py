"""A trained hypernetwork on disk, and its use on a tokenizer that it has not seen.

FOLDER/hypernet.safetensors  its weights
FOLDER/hypernet.json         its shape, and whose rows it reads: digests of the rows and of the tokenizer
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.disk import write_durably
from tokenkit.embeddings.hypernet import Hypernet, surfaces
from tokenkit.embeddings.hypernet_options import HypernetOptions
from tokenkit.embeddings.rows import Matching, RowSources, row_sources
from tokenkit.tokenization.tokenizer import Tokenizer

WEIGHTS, ABOUT = "hypernet.safetensors", "hypernet.json"
FORMAT = 1
TOKENS = 4096
"""Whose rows are written at a time."""


class HypernetRows(NamedTuple):
    """Rows for a new tokenizer, padding included."""

    input_VD: Tensor
    output_VD: Tensor | None
    """None: tied to the input."""
    sources: RowSources


def save_hypernet(folder: Path, hypernet: Hypernet, about: Mapping[str, Any]) -> None:
    """Write a hypernetwork; the JSON comes last, so that a folder with one is complete.

    Weights without a JSON are what a crash left between the two, and are replaced.

    Args:
        folder: exists.
        hypernet: the network.
        about: plain JSON: `base_model` with the digest of its `rows`, `old_tokenizer` with its
            `fingerprint`, and anything else.

    Raises:
        FileExistsError: the folder holds one.
    """
    from safetensors.torch import save

    if (folder / ABOUT).exists():
        raise FileExistsError(f"{folder / ABOUT} exists: choose another folder, or move it away")
    state = {name: tensor.detach().contiguous() for name, tensor in hypernet.state_dict().items()}
    write_durably(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    shape = {name: getattr(hypernet, name) for name in ("width", "reads", "writes", "max_pieces")}
    content = {"format": FORMAT, "options": asdict(hypernet.options), **shape, **about}
    write_durably(folder / ABOUT, json.dumps(content, indent=1) + "\n")


def load_hypernet(folder: Path) -> tuple[Hypernet, dict[str, Any]]:
    """Read what `save_hypernet` wrote.

    Raises:
        FileNotFoundError: the folder holds no hypernetwork.
        ValueError: files that are none, or that do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no hypernetwork ({ABOUT} and {WEIGHTS}): `tokenkit train-hypernet` writes one"
        )
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, expected {FORMAT}")
        hypernet = Hypernet(
            HypernetOptions(**about["options"]),
            about["width"],
            reads=about["reads"],
            writes=about["writes"],
            max_pieces=about["max_pieces"],
        )
        hypernet.load_state_dict(load_file(folder / WEIGHTS))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no hypernetwork can be read from {folder}: {reason}; "
            "train it again with `tokenkit train-hypernet`"
        ) from error
    return hypernet.eval(), about


def rows_digest(matrices: Sequence[Tensor]) -> str:
    """Return a digest of the rows that a hypernetwork reads, the same in float32 and bfloat16.

    64 rows of each matrix, spread evenly: training moves all of them.
    """
    digest = hashlib.sha256()
    for matrix in matrices:
        chosen = torch.linspace(0, len(matrix) - 1, min(64, len(matrix))).long()
        rows = matrix.detach()[chosen.to(matrix.device)].cpu().to(torch.bfloat16).contiguous()
        digest.update(f"{tuple(matrix.shape)}".encode())
        digest.update(rows.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_hypernet(
    hypernet: Hypernet, about: Mapping[str, Any], matrices: Sequence[Tensor], old: Tokenizer
) -> None:
    """Refuse a hypernetwork of another model or tokenizer: it has learned these rows and no others.

    Raises:
        ValueError: naming what differs.
    """
    hypernet.check(matrices)
    found = {"base_model": rows_digest(matrices), "old_tokenizer": old.fingerprint()}
    for name, fingerprint in found.items():
        known = about.get(name, {})
        expected = known.get("rows" if name == "base_model" else "fingerprint")
        if expected != fingerprint:
            raise ValueError(
                f"the hypernetwork was trained on another {name.replace('_', ' ')} ({known.get('name')}, "
                f"{str(expected)[:12]}) than the one here ({fingerprint[:12]}): "
                "train one on this model with `tokenkit train-hypernet`"
            )


@torch.no_grad()
def hypernet_rows(
    hypernet: Hypernet,
    old: Tokenizer,
    new: Tokenizer,
    matrices: Sequence[Tensor],
    size: int,
    matching: Matching | None = None,
) -> HypernetRows:
    """Write rows for `new`, `size` of them; those beyond its ids are the mean of all old rows.

    Args:
        hypernet: trained on these matrices.
        old: the tokenizer of the matrices.
        new: any tokenizer.
        matrices: [W, D], the rows that the hypernetwork reads: input, and output of an untied model.
        size: number of rows, at least `new.vocab_size`.
        matching: which special tokens keep their old row; the others are the mean of all.

    Raises:
        ValueError: matrices of another width or number than the hypernetwork's.
    """
    sources = row_sources(old, new, matching)
    olds = [matrix.detach()[: old.vocab_size] for matrix in matrices]
    rows = [sources.rows(olds[min(index, len(olds) - 1)], size) for index in range(hypernet.writes)]
    for start in range(0, new.vocab_size, TOKENS):  # in place: a few matrices of 128k rows exceed a model
        stop = min(start + TOKENS, new.vocab_size)
        found = surfaces(sources.part(start, stop), hypernet.max_pieces)
        written = hypernet(found, olds, [rows_VD[start:stop] for rows_VD in rows])
        for rows_VD, part_VD in zip(rows, written, strict=True):
            rows_VD[start:stop] = part_VD
    return HypernetRows(rows[0], rows[1] if len(rows) > 1 else None, sources)
