"""`tokenkit mined-mapping`: the nearest teacher token of every student token, for losses that need one.

tokenkit mined-mapping --teacher-tokenizer-name llama3 --target-tokenizer-name gpt2 --output mapping
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.errors import ConfigError, blaming_data, names_a_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray


MAX_WORKERS = 1024  # many more threads than cores take all that the system has, and mine no faster


@dataclass(frozen=True, kw_only=True)
class MinedMappingConfig:
    """Map every student token to the teacher token whose bytes are nearest to its own."""

    teacher_tokenizer_name: str
    """Tokenizer spec of the teacher (a path, a hub name, or `byte`)."""

    target_tokenizer_name: str
    """Tokenizer spec that the student ends with."""

    output: str
    """Folder for mapping.npy, distances.npy and summary.json; files that exist are never overwritten."""

    teacher_counts: str | None = None
    """npy file with the count of each teacher token: of equally near tokens the most frequent wins. Without
    it the lowest id does."""

    num_workers: int = 0
    """Threads; 0: one for each core."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        names_a_folder("output", self.output)
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise ConfigError(f"num_workers must lie in [0, {MAX_WORKERS}], got {self.num_workers}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: mine(parse_command_line(MinedMappingConfig, argv, program="tokenkit mined-mapping")))


def mine(config: MinedMappingConfig) -> None:
    """Mine the mapping and write it.

    Raises:
        ValueError, FileNotFoundError: tokenizers or counts that cannot be read or do not fit.
        FileExistsError: the output holds files of these names.
    """
    from tqdm import tqdm

    from tokenkit.disk import check_vacant
    from tokenkit.pairing.mining import FILES, mine_mapping, save_mapping
    from tokenkit.tokenization.spec import parse_spec
    from tokenkit.tokenization.tokenizer import load_tokenizer

    folder = Path(config.output).expanduser()
    check_vacant(folder, FILES)
    specs = [parse_spec(name) for name in (config.target_tokenizer_name, config.teacher_tokenizer_name)]
    counts = None
    with blaming_data():
        student, teacher = map(load_tokenizer, specs)
        if config.teacher_counts is not None:
            counts = _read_counts(Path(config.teacher_counts).expanduser())
    began = time.perf_counter()
    with tqdm(total=student.vocab_size, unit="token", disable=not sys.stderr.isatty()) as bar:
        mapping = mine_mapping(
            student, teacher, teacher_counts=counts, workers=config.num_workers, progress=bar.update
        )
    about = {
        "student": {"tokenizer": config.target_tokenizer_name, "fingerprint": student.fingerprint()},
        "teacher": {"tokenizer": config.teacher_tokenizer_name, "fingerprint": teacher.fingerprint()},
        "teacher_counts": config.teacher_counts,
        "seconds": round(time.perf_counter() - began, 1),
    }
    save_mapping(mapping, folder, about)
    facts = mapping.summary()
    print(
        f"{facts['tokens']} tokens, {facts['exact']} of them exact, mean distance "
        f"{facts['mean_distance']:.2f}: {folder / 'mapping.npy'}"
    )


def _read_counts(path: Path) -> NDArray[Any]:
    import numpy as np

    try:
        counts = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"teacher_counts {path} must be an npy file of numbers and cannot be read as one: `tokenkit "
            "pair-stats` writes teacher_counts.npy"
        ) from error
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iuf":
        raise ValueError(f"teacher_counts {path} must be an npy file of one array of numbers")
    if not (counts >= 0).all():  # nor NaN
        raise ValueError(f"teacher_counts {path} must hold counts: got a negative number or NaN")
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
