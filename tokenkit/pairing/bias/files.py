"""Pair statistics on disk: two sparse matrices, the counts behind them, and whose they are.

    FOLDER/teacher_bias.npz student_bias.npz   [W, V] in scipy's COO format; a stored 0 is a pair without bias
    FOLDER/teacher_counts.npy student_counts.npy
    FOLDER/summary.json                        fingerprints of both tokenizers, settings, figures

`scipy.sparse.load_npz` reads the matrices; nothing here needs scipy.

Dimensions: V student vocabulary, W teacher vocabulary, P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenkit.disk import check_vacant
from tokenkit.pairing.bias.bias import PairBiases
from tokenkit.tokenization.tokenizer import Tokenizer

MATRICES = ("teacher_bias.npz", "student_bias.npz")
COUNTS = ("teacher_counts.npy", "student_counts.npy")
SUMMARY = "summary.json"

FILES = (*MATRICES, *COUNTS, SUMMARY)


def save_biases(
    folder: Path,
    biases: PairBiases,
    counts: tuple[NDArray[np.int64], NDArray[np.int64]],
    about: Mapping[str, Any],
) -> None:
    """Write the statistics; the summary comes last, so that a folder with one is complete.

    Raises:
        FileExistsError: if the folder holds statistics.
    """
    check_vacant(folder, FILES)
    folder.mkdir(parents=True, exist_ok=True)
    for name, bias_P in zip(MATRICES, (biases.teacher_bias_P, biases.student_bias_P), strict=True):
        np.savez_compressed(
            folder / name,
            row=biases.teacher_P,
            col=biases.student_P,
            data=bias_P,
            shape=np.array(biases.shape),
            format=np.array(b"coo"),
        )
    for name, count_V in zip(COUNTS, counts, strict=True):
        np.save(folder / name, count_V)
    (folder / SUMMARY).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_biases(folder: Path, teacher: Tokenizer, student: Tokenizer) -> PairBiases:
    """Read the statistics of a pair.

    Raises:
        FileNotFoundError: no statistics there.
        ValueError: statistics of other tokenizers, or files that do not belong together.
    """
    for name in (SUMMARY, *MATRICES):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no pair statistics (no {name}): make them with `tokenkit pair-stats`"
            )
    about = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    for side, tokenizer in (("teacher", teacher), ("student", student)):
        if about.get(side, {}).get("fingerprint") != tokenizer.fingerprint():
            raise ValueError(
                f"{folder} holds the statistics of another {side} tokenizer "
                f"({about.get(side, {}).get('tokenizer')}), not of {tokenizer.spec}: make them for this pair "
                "with `tokenkit pair-stats`"
            )
    arrays = []
    for name in MATRICES:
        with np.load(folder / name, allow_pickle=False) as stored:
            arrays.append({key: stored[key] for key in ("row", "col", "data", "shape")})
    first, second = arrays
    if not all(np.array_equal(first[key], second[key]) for key in ("row", "col", "shape")):
        raise ValueError(
            f"{folder}: {MATRICES[0]} and {MATRICES[1]} do not hold the same pairs: make them anew"
        )
    rows, columns = (int(n) for n in first["shape"])
    return PairBiases(first["row"], first["col"], first["data"], second["data"], (rows, columns))
