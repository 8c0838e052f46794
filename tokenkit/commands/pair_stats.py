"""`tokenkit pair-stats`: the tokenization biases of every pair of tokens, for losses that look at them.

tokenkit pair-stats --teacher-tokenizer-name llama3 --target-tokenizer-name gpt2
    --data.dataset-name stories.txt --output pair
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.data.options import DataOptions
from tokenkit.errors import ConfigError, blaming_data, names_a_folder


@dataclass(frozen=True, kw_only=True)
class PairStatsConfig:
    """Measure how far the ends of two tokenizations differ in what may follow, for every pair of tokens."""

    teacher_tokenizer_name: str
    """Tokenizer spec of the teacher (a path, a hub name, or `byte`)."""

    target_tokenizer_name: str
    """Tokenizer spec that the student ends with."""

    output: str
    """Folder for the matrices, the counts and summary.json. A count that was interrupted goes on there."""

    teacher_subsample_percent: float = 100.0
    """Share of the documents in which the teacher's tokens are counted."""

    student_subsample_percent: float = 100.0
    """Share of the documents in which the student's tokens are counted."""

    additive_smoothing_constant: float = 1e-9
    """Added to each token's count, as a share of all tokens: no token has probability 0."""

    min_continuation_probability: float = 0.0
    """Leaves out continuations that end no token of this probability, for less time and memory; summary.json
    says by how much a bias may then be too small. 0: none, biases are exact."""

    seed: int = 0
    """Chooses the documents of a share."""

    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        names_a_folder("output", self.output)
        if self.data.dataset_name is None and not self.data.datasets:
            raise ConfigError(
                "missing required field data.dataset_name (or data.datasets): there is nothing to count"
            )
        for name in ("teacher_subsample_percent", "student_subsample_percent"):
            if not 0 < getattr(self, name) <= 100:
                raise ConfigError(f"{name} must lie in (0, 100], got {getattr(self, name)}")
        least = self.min_continuation_probability
        if not 0 <= least < 1:
            raise ConfigError(f"min_continuation_probability must lie in [0, 1), got {least}")
        constant = self.additive_smoothing_constant
        if not 0 <= constant <= 1:
            raise ConfigError(
                f"additive_smoothing_constant is a share of all tokens and must lie in [0, 1], got {constant}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: measure(parse_command_line(PairStatsConfig, argv, program="tokenkit pair-stats")))


def measure(config: PairStatsConfig) -> None:
    """Count, compare and write.

    Raises:
        ValueError, FileNotFoundError: tokenizers or data that cannot be read or have nothing in common.
        FileExistsError: the output holds statistics.
    """
    from tqdm import tqdm

    from tokenkit.data.token_counts import Counted, count_tokens
    from tokenkit.disk import check_vacant
    from tokenkit.pairing.bias.bias import check_any_pair, find_biases
    from tokenkit.pairing.bias.files import FILES, save_biases
    from tokenkit.tokenization.spec import parse_spec
    from tokenkit.tokenization.tokenizer import load_tokenizer

    folder = Path(config.output).expanduser()
    check_vacant(folder, FILES)
    specs = [parse_spec(name) for name in (config.teacher_tokenizer_name, config.target_tokenizer_name)]
    with blaming_data():
        teacher, student = map(load_tokenizer, specs)
    check_any_pair(teacher, student)
    sides = {
        "teacher": Counted(teacher, config.teacher_subsample_percent),
        "student": Counted(student, config.student_subsample_percent),
    }
    quiet = not sys.stderr.isatty()
    began = time.perf_counter()
    with tqdm(unit="document", disable=quiet) as bar, blaming_data():
        counts = count_tokens(config.data, sides, folder, seed=config.seed, progress=bar.update)
    counted = time.perf_counter()
    smoothing = config.additive_smoothing_constant
    teacher_p, student_p = (
        (count_V / count_V.sum() + smoothing) / (1 + smoothing * len(count_V)) for count_V in counts.values()
    )
    with tqdm(unit="token", disable=quiet) as bar:
        biases = find_biases(
            teacher, student, teacher_p, student_p, bar.update,
            min_probability=config.min_continuation_probability,
        )  # fmt: skip
    seconds = time.perf_counter() - counted
    pairs = len(biases.teacher_P)
    unbiased = len(biases.pairs_below(0.1)[0]) / pairs
    about = {
        "teacher": {"tokenizer": config.teacher_tokenizer_name, "fingerprint": teacher.fingerprint()},
        "student": {"tokenizer": config.target_tokenizer_name, "fingerprint": student.fingerprint()},
        "teacher_tokens_counted": int(counts["teacher"].sum()),
        "student_tokens_counted": int(counts["student"].sum()),
        "additive_smoothing_constant": smoothing,
        "min_continuation_probability": config.min_continuation_probability,
        "largest_error": dict(zip(sides, biases.error_bounds, strict=True)),
        "pairs": pairs,
        "seconds_counting": round(counted - began, 1),
        "seconds_comparing": round(seconds, 1),
        "pairs_per_second": round(pairs / seconds),
        "share_unbiased_at_0.1": unbiased,
    }
    save_biases(folder, biases, (counts["teacher"], counts["student"]), about)
    print(f"{pairs} pairs in {seconds:.0f} s, {unbiased:.1%} of them unbiased: {folder}")
    if config.min_continuation_probability:
        teacher_error, student_error = biases.error_bounds
        print(
            f"rare continuations left out: a teacher's bias is too small by {teacher_error:.2g} at most, a "
            f"student's by {student_error:.2g}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
