"""The door of training: `tokenkit train`, `python -m tokenkit.train`, `torchrun -m tokenkit.train`.

    python -m tokenkit.train --config configs/cross_tokenizer_distill.yaml

Flags are read before anything heavy is imported, so `--help` and every error in a configuration come at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tokenkit.cli import run
from tokenkit.config import ALIASES, TrainConfig, parse_command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Read the configuration, train, and return the exit code."""

    def read_and_train() -> int:
        config = parse_command_line(TrainConfig, argv, program="tokenkit train", aliases=ALIASES)

        if any(":" in name for name in config.objective.losses):
            sys.path.append(os.getcwd())  # where `python -m` looks, a command looks too; behind all else

        def train_as_configured() -> object:
            from tokenkit.training.loop import train

            return train(config)

        return run(train_as_configured, debug=config.run.debug)

    return run(read_and_train)


if __name__ == "__main__":
    raise SystemExit(main())
