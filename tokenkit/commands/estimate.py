"""`tokenkit estimate`: memory, communication and time of a training, before it is started.

tokenkit estimate --config FILE --gpus 8 --gpu H100
tokenkit estimate --student PATH --target byte:target=Qwen2 --data FILE --losses alm_unconstrained
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenkit.cli import run
from tokenkit.config import ALIASES, TrainConfig, parse_command_line
from tokenkit.config.command_line import take_own
from tokenkit.errors import ConfigError, at_least, names_a_new_file, nearest

USAGE = """usage: tokenkit estimate [--gpus N,N] [--gpu KIND] [--mfu SHARE] [--output FILE] [OPTIONS]

Say what each GPU of a training holds, sends and computes. Configurations and tokenizers are read, weights and
data are not: folders with a config.json alone will do.

  --gpus N,N      Processes over which the models are sharded (default: 1); several are compared.
  --gpu KIND      A10, L4, L40S, RTX4090, A100-40GB, A100-80GB, H100, H200, B200: says whether it fits, and
                  calculates seconds from what its maker publishes.
  --mfu SHARE     Of the GPU's peak that is reached (default: 0.4). Assumed: no GPU was measured.
  --output FILE   The figures as JSON; it must not exist.

All further options are those of `tokenkit train` (--config FILE, --student, --target, --losses, ...).
"""


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """What is asked beside the training."""

    gpus: tuple[int, ...] = (1,)
    gpu: str | None = None
    mfu: float = 0.4
    output: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before torch is loaded."""
        for ranks in self.gpus:
            at_least("gpus", ranks, 1, 2**20)
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"mfu must be above 0 and at most 1: got {self.mfu}")
        names_a_new_file("output", self.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: show(list(sys.argv[1:] if argv is None else argv)))


def show(arguments: list[str]) -> int:
    """Print the estimates, and write them.

    Raises:
        ConfigError: an option that is none, or a batch that so many processes cannot share.
        DataError, FileNotFoundError: a model or tokenizer that cannot be read.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    options, rest = take_options(arguments)
    config = parse_command_line(TrainConfig, rest, program="tokenkit estimate", aliases=ALIASES)
    from tokenkit.disk import write_durably
    from tokenkit.training.estimate import estimate, table, to_json
    from tokenkit.training.gpus import GPUS

    gpu = None
    if options.gpu is not None:
        kinds = {kind.lower(): kind for kind in GPUS}
        if options.gpu.lower() not in kinds:
            raise ConfigError(
                f"gpu {options.gpu!r} is unknown{nearest(options.gpu, GPUS)}: {', '.join(GPUS)}"
            )
        gpu = GPUS[kinds[options.gpu.lower()]]
    found = {ranks: estimate(config, ranks, gpu, mfu=options.mfu) for ranks in options.gpus}
    print(table(found, gpu))
    if options.output is not None:
        text = json.dumps({str(ranks): to_json(one) for ranks, one in found.items()}, indent=2)
        write_durably(Path(options.output).expanduser(), text + "\n")
    return 0


def take_options(arguments: Sequence[str]) -> tuple[EstimateOptions, list[str]]:
    """Split the options of the estimate itself from those of the training.

    Raises:
        ConfigError: an option without its value, or a value that is none.
    """
    readers: dict[str, Any] = {"gpus": _counts, "gpu": str, "mfu": float, "output": str}
    values, rest = take_own(arguments, readers, "tokenkit estimate")
    return EstimateOptions(**values), rest


def _counts(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
