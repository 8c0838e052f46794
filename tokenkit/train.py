"""The door of training: `tokenkit train`, `python -m tokenkit.train`, `torchrun -m tokenkit.train`.

    python -m tokenkit.train --config configs/cross_tokenizer_distill.yaml

Flags are read before anything heavy is imported, so `--help` and every error in a configuration come at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tokenkit.cli import run
from tokenkit.config import ALIASES, EXIT_CONFIG, ConfigError, TrainConfig, parse_command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Read the configuration, train, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = parse_command_line(TrainConfig, arguments, program="tokenkit train", aliases=ALIASES)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank reads the same configuration
            print(f"tokenkit: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIG

    def door() -> object:
        from tokenkit.training.loop import train

        return train(config)

    return run(door, debug=config.run.debug)


if __name__ == "__main__":
    raise SystemExit(main())
