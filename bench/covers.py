"""Covers by scores or merges, and by asking the tokenizer for every candidate: the same, in which time.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python bench/covers.py --data DATA \\
        --save bench/results/cpu/covers.json

Fails where one cover differs. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from harness import print_table, save
from numpy.typing import NDArray

from tokenkit.pairing.bias.covers import Covers, find_covers
from tokenkit.pairing.bias.writing import ByWriting
from tokenkit.tokenization.tokenizer import load_tokenizer

TOKENIZERS = ("t5-small", "qwen2.5-sub8000")


def main() -> None:
    """Find the covers of each tokenizer in both ways and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with tokenizers/")
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    parser.add_argument("--tokenizers", nargs="+", default=list(TOKENIZERS))
    arguments = parser.parse_args()
    rows = {name: measure(arguments.data / "tokenizers" / name) for name in arguments.tokenizers}
    print_table(rows)
    if arguments.save:
        save(arguments.save, "cpu", rows)


def measure(folder: Path) -> dict[str, object]:
    """Return the figures of one tokenizer."""
    tokenizer = load_tokenizer(str(folder))
    questions = 0

    def ask(self: ByWriting, *candidates, original=ByWriting.ask) -> None:
        nonlocal questions
        questions += len(candidates[-1])
        original(self, *candidates)

    ByWriting.ask = ask  # type: ignore[method-assign]
    figures: dict[str, object] = {"tokens": tokenizer.vocab_size}
    found = []
    for name, asks_always in (("fast", False), ("asking", True)):
        questions, began = 0, time.process_time()
        found.append(find_covers(tokenizer, asks_always=asks_always))
        seconds = round(time.process_time() - began, 1)
        figures |= {f"{name}_s": seconds, f"{name}_asked": questions}
    ByWriting.ask = ask.__kwdefaults__["original"]  # type: ignore[method-assign]
    if not np.array_equal(*map(entries, found)):
        raise SystemExit(f"{folder.name}: the covers differ")
    return figures | {"entries": len(found[0].token_E)}


def entries(covers: Covers) -> NDArray[np.int64]:
    """Return (token, token written, bytes inside) of every entry, sorted."""
    owner_E = np.repeat(np.arange(len(covers.offset_V) - 1), np.diff(covers.offset_V))
    return np.unique(np.stack([owner_E, covers.token_E, covers.inside_E], axis=1).astype(np.int64), axis=0)


if __name__ == "__main__":
    main()
