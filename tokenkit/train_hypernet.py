"""`tokenkit train-hypernet`: a network that writes embeddings for tokenizers which it has not seen.

tokenkit train-hypernet --model.pretrained-model-name-or-path model
    --data.dataset-name stories.txt --steps 500 --output hypernet
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.hypernet import TrainHypernetConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Read the configuration, train, and return the exit code."""

    def read_and_train() -> object:
        config = parse_command_line(TrainHypernetConfig, argv, program="tokenkit train-hypernet")
        from tokenkit.training.hypernet_loop import train

        return train(config)

    return run(read_and_train)


if __name__ == "__main__":
    raise SystemExit(main())
