"""Pair statistics and mined mappings of real pairs, and the definition of a bias on a sample of each pair.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python bench/pair_stats.py --data DATA --output outputs/pairs \\
        --save bench/results/cpu/pair_stats.json

Both commands run in processes of their own, start and counting included; seconds are those of the
processor and of the wall, the peak resident set is its VmHWM. The definition asks the tokenizer, in one
batch for each side of a pair, for every continuation that some token could cover; its biases must be
those of the matrices, or this script fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from harness import print_table, run_command, save

from tokenkit.pairing.bias.files import load_biases
from tokenkit.pairing.bias.writing import Writer
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer

PAIRS = ("llama3,qwen2.5", "llama2,gpt2", "qwen2.5,byte")
SMOOTHING = 1e-9
FIGURES = (
    "pairs", "unbiased", "cpu_s", "wall_s", "peak_MiB", "pairs_per_cpu_s", "by_definition", "mined_cpu_s",
    "mined_wall_s", "mined_peak_MiB", "mined_exact", "mined_tokens",
)  # fmt: skip


def main() -> None:
    """Run both commands for each pair, compare a sample with the definition, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with tokenizers/ and text/")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of what is written; must not exist"
    )
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="TEACHER,STUDENT below tokenizers/")
    parser.add_argument("--sample", type=int, default=300, help="pairs that the definition is asked for")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    rows = {}
    for pair in arguments.pairs:
        rows[pair] = measure(arguments, pair)
        print(json.dumps({pair: rows[pair]}), file=sys.stderr, flush=True)
    print_table({figure: {pair: row[figure] for pair, row in rows.items()} for figure in FIGURES})
    if arguments.save:
        save(arguments.save, "cpu", {"sample": arguments.sample, "pairs": rows})


def measure(arguments: argparse.Namespace, pair: str) -> dict[str, float]:
    """Return the figures of one pair."""
    specs = [
        name if name == "byte" else str(arguments.data / "tokenizers" / name) for name in pair.split(",")
    ]
    folder = arguments.output / pair.replace(",", "-")
    flags = ["--teacher-tokenizer-name", specs[0], "--target-tokenizer-name", specs[1], "--output"]
    text = str(arguments.data / "text" / "tinystories.heldout.txt")
    biases = run_command("pair_stats", [*flags, str(folder / "pair"), "--data.dataset-name", text])
    mining = run_command("mined_mapping", [*flags, str(folder / "mapping"), "--num-workers", "1"])
    about = json.loads((folder / "pair" / "summary.json").read_text())
    mined = json.loads((folder / "mapping" / "summary.json").read_text())
    teacher, student = map(load_tokenizer, specs)
    rate = definition_rate(folder / "pair", teacher, student, arguments.sample)
    figures = (
        about["pairs"],
        about["share_unbiased_at_0.1"],
        *biases,
        round(about["pairs"] / biases[0]),
        rate,
        *mining,
        mined["exact"],
        mined["tokens"],
    )
    return dict(zip(FIGURES, figures, strict=True))


def definition_rate(folder: Path, teacher: Tokenizer, student: Tokenizer, sample: int) -> float:
    """Compare random pairs with the definition, and return how many pairs a processor second takes."""
    biases = load_biases(folder, teacher, student)
    weights = []
    for side in ("teacher", "student"):
        count_V = np.load(folder / f"{side}_counts.npy")
        weights.append((count_V / count_V.sum() + SMOOTHING) / (1 + SMOOTHING * len(count_V)))
    sides = Definition(teacher), Definition(student)
    chosen = np.random.default_rng(0).choice(len(biases.teacher_P), sample, replace=False)
    seconds = 0.0  # of the processor: other work on the machine hardly moves them
    for place in chosen.tolist():
        ids = int(biases.teacher_P[place]), int(biases.student_P[place])
        began = time.process_time()
        found = by_definition(sides, ids, weights)
        seconds += time.process_time() - began
        ours = biases.teacher_bias_P[place], biases.student_bias_P[place]
        if not np.allclose(ours, found, rtol=0, atol=1e-12):
            raise SystemExit(f"pair {ids} of {teacher.spec}, {student.spec}: {ours}, not {found}")
    return round(sample / seconds, 2)


def by_definition(
    sides: tuple[Definition, Definition], ids: tuple[int, int], weights: list[Any]
) -> tuple[float, float]:
    """Return both biases of a pair."""
    if any(side.tokenizer.token_bytes[i].isspace() for side, i in zip(sides, ids, strict=True)):
        return 1.0, 1.0
    ours, theirs = (side.cover(i) for side, i in zip(sides, ids, strict=True))
    return (
        float(sum(weights[0][token] for c, token in ours.items() if c not in theirs)),
        float(sum(weights[1][token] for c, token in theirs.items() if c not in ours)),
    )


class Definition:
    """Asks a tokenizer for every continuation that a token could cover."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.writer = tokenizer, Writer(tokenizer)
        self.texts = sorted(
            {text for i, text in enumerate(tokenizer.token_bytes) if text and not tokenizer.is_special_V[i]}
        )

    def cover(self, token_id: int) -> dict[bytes, int]:
        """Return {continuation: the token that is written across the end of this one}."""
        text = self.tokenizer.token_bytes[token_id]
        tried: set[bytes] = set()
        for cut in range(len(text)):
            suffix = text[cut:]
            begin = bisect_right(self.texts, suffix)
            end = bisect_left(self.texts, True, lo=begin, key=lambda x, s=suffix: not x.startswith(s))
            tried.update(other[len(suffix) :] for other in self.texts[begin:end])
        continuations = list(tried)
        last = self.writer.last_tokens([text + continuation for continuation in continuations])
        return {
            c: token
            for c, token in zip(continuations, last, strict=True)
            if token >= 0
            and len(other := self.tokenizer.token_bytes[token]) > len(c)
            and (text + c).endswith(other)
        }


if __name__ == "__main__":
    main()
