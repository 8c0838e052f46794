"""`tokenkit pretrain`: train a language model from nothing, by a file of five sections.

    tokenkit pretrain --config config.yaml
    torchrun --nproc-per-node 8 -m tokenkit.commands.pretrain --config config.yaml

The sections become the configuration of `tokenkit train`, whose loop does the rest: docs/pretrain.md.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.pretrain import OWN, EvalSection, PretrainConfig, train_config
from tokenkit.config.pretrain_train import processes

RANKS = (1, 2, 4, 8, 16)
"""Numbers of processes whose memory a dry run compares, beside those of this start."""

ALIASES = {
    "output_dir": "train_config.output_dir",
    "max_steps": "train_config.max_steps",
    "resume": "train_config.resume_from_checkpoint",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the configuration, train, and return the exit code."""

    def read_and_train() -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        config = parse_command_line(PretrainConfig, arguments, program="tokenkit pretrain", aliases=ALIASES)
        return run(lambda: pretrain(config), debug=config.own.debug)

    return run(read_and_train)


def pretrain(config: PretrainConfig) -> int:
    """Train, or say what it would take.

    Raises:
        ConfigError, DataError, OSError: before anything is trained.
    """
    logging.getLogger("tokenkit").setLevel(config.train_config.intervals.log_level.upper())
    if config.own.dry_run:
        print(dry_run(config))
        return 0
    train, data = config.train_config, config.dataset_config
    counted = None
    if train.length.num_train_epochs is not None and train.length.steps_per_epoch is None:
        from tokenkit.data.epoch import rows_of_an_epoch

        length = data.max_seq_length if data.pack else None
        rows = rows_of_an_epoch(data.datasets, data.heldout_fraction, data.tokenizer_name, length)
        counted = max(1, rows // train.portions.rows)
        print(f"an epoch is {rows:,} rows, {counted:,} steps of {train.portions.rows}", file=sys.stderr)
    made = train_config(config, counted)
    from tokenkit.training.loop import train as run_training

    return run_training(made)


def dry_run(config: PretrainConfig) -> str:
    """Return in words how large the model is, and what its training takes; nothing is allocated.

    Raises:
        ConfigError: no such model, or fewer rows than its tokenizer has ids.
    """
    from tokenkit.models.new import ids_of, new_model_on_meta
    from tokenkit.training.shares import share, table

    train, data = config.train_config, config.dataset_config
    known = bool(train.length.max_steps or train.length.steps_per_epoch)
    made = train_config(dataclasses.replace(config, eval_config=EvalSection()), None if known else 1)
    ids = ids_of(data.tokenizer_name)
    model = new_model_on_meta({"model_type": OWN, **config.model_config}, ids).float()  # as it is trained
    how: dict[str, Any] = {"itemsize": 4 if made.training.dtype == "float32" else 2}
    how["adds_up"] = train.portions.gradient_accumulation_steps > 1
    steps = made.schedule.steps
    tokens = train.portions.rows * data.max_seq_length
    length = f"{steps:,} steps, {steps * tokens:,} tokens" if known else "as many steps as the data has"
    lines = [
        f"{config.kind}: {sum(p.numel() for p in model.parameters()):,} parameters",
        f"a step: {train.portions.rows} rows of {data.max_seq_length:,} tokens, {tokens:,} tokens; {length}; "
        f"{made.schedule.warmup_steps:,} of them warm up",
        table({ranks: share(model, ranks, **how) for ranks in sorted({*RANKS, processes()})}),
        f"dry run: nothing was loaded, and nothing written to {Path(made.run.output_dir)}",
    ]
    if config.eval_config.evals:
        lines.insert(
            2, f"benchmarks every {train.intervals.eval_steps:,} steps: {', '.join(config.eval_config.evals)}"
        )
    if ids is None:
        lines.insert(1, f"the tokenizer {data.tokenizer_name} is not here: whether it fits was not seen")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
