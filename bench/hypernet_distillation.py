"""What a hypernetwork is worth inside distillation: the same runs with and without it.

    python bench/hypernet_distillation.py --data DATA --output outputs/projector --save FILE.json

Every run is `python -m tokenkit.train` in a process of its own, ALM + CLM, from the same rows; only what is
trained differs. Bits per byte on 60 held-out stories.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness import machine
from transfer import LOSSES, flags, run

TRAINED = {
    "rows": ["--train-model-mode", "none"],
    "rows + network": ["--train-model-mode", "none", "--hypernet.architecture", "transformer"],
    "network": [
        *["--train-model-mode", "none", "--train-embeddings", "false"],
        *["--hypernet.architecture", "transformer"],
    ],
    "all": ["--train-model-mode", "full"],
    "all + network": ["--train-model-mode", "full", "--hypernet.architecture", "transformer"],
}


def main() -> None:
    """Run the matrix and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, tokenizers/ and text/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--targets", nargs="+", default=["tinystories10k", "qwen2.5"])
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[2e-3])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    rows = []
    for target in arguments.targets:
        for name in arguments.trained:
            for rate in arguments.learning_rates:
                folder = arguments.output / f"{target}-{name.replace(' + ', '-')}-{rate:g}"
                command = flags(arguments, target, "full", LOSSES["ALM + CLM"], folder)
                more = [*TRAINED[name], "--optimizer.learning-rate", str(rate)]
                rows.append(
                    {"target": target, "trained": name, "rate": rate, **run([*command, *more], folder)}
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        command_line = f"python bench/hypernet_distillation.py {' '.join(sys.argv[1:])}"
        content = {"command": command_line, "machine": machine("cpu"), "rows": rows}
        arguments.save.write_text(json.dumps(content, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """Return one markdown row per run."""
    lines = ["| target | trained | rate | teacher | FVT | after | seconds | peak MiB |", "|---" * 8 + "|"]
    for row in rows:
        lines.append(
            f"| {row['target']} | {row['trained']} | {row['rate']:g} | {row['teacher']:.3f} | "
            f"{row['fvt']:.3f} | {row['student']:.3f} | {row['seconds']:.0f} | {row['peak_mib']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
