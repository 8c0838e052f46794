"""Every loss alone and with clm: bits per byte after equal steps of the trainer on a real model.

    python bench/losses.py --data DATA --output outputs/losses --save bench/results/cpu/losses.json

The student is the model under another tokenizer, its teacher a frozen copy of it under the old one (or
`--teacher`, another model). Every run is `python -m tokenkit.train` in a process of its own. Prints a
markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import machine
from transfer import flags, run

from tokenkit.losses.options import CROSS_TOKENIZER

ALM = ("alm_unconstrained", "alm_space", "alm_unbiased")
WEIGHTS = dict.fromkeys(ALM, 100)  # their temperature of 100 divides the gradient
SETTINGS = ("model", "teacher", "target", "steps")


def main() -> None:
    """Run every loss and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, tokenizers/ and text/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--teacher", help="a model of DATA; without it the model teaches itself")
    parser.add_argument("--target", default="tinystories10k")
    parser.add_argument("--losses", nargs="+", default=list(CROSS_TOKENIZER))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    combinations = [(name,) for name in arguments.losses]
    combinations += [("clm", name) for name in arguments.losses if name != "clm"]
    learn_pair(arguments)
    flags(arguments, arguments.target, "full", [], arguments.output / "any")  # writes the held-out stories
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda names: measure(arguments, names), combinations))
    print(table(rows))
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        facts = machine("cpu") | {
            key: str(value) for key, value in vars(arguments).items() if key in SETTINGS
        }
        arguments.save.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


def learn_pair(arguments: argparse.Namespace) -> None:
    """Write the mapping and the statistics that some losses read."""
    pair = [
        "--teacher-tokenizer-name",
        str(arguments.data / "models" / (arguments.teacher or arguments.model)),
    ]
    pair += ["--target-tokenizer-name", str(arguments.data / "tokenizers" / arguments.target)]
    text = ["--data.dataset-name", str(arguments.data / "text" / "tinystories.train.txt")]
    for door, words in (("mined_mapping", []), ("pair_stats", text)):
        output = ["--output", str(arguments.output / door)]
        subprocess.run([sys.executable, "-m", f"tokenkit.{door}", *pair, *words, *output], check=True)


def measure(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """Train with these losses; return bits per byte before and after."""
    folder = arguments.output / "-".join(names)
    words = ["--losses", *names, "--loss-weights", *(str(WEIGHTS.get(name, 1)) for name in names)]
    words += ["--mined-mapping-path", str(arguments.output / "mined_mapping")]
    words += ["--tokenizer-pair-data-path", str(arguments.output / "pair_stats"), "--latents-do-project"]
    if arguments.teacher:
        words += [
            "--teacher.pretrained-model-name-or-path",
            str(arguments.data / "models" / arguments.teacher),
        ]
    row = run(flags(arguments, arguments.target, "full", words, folder), folder)
    print(json.dumps({"losses": names, **row}), file=sys.stderr, flush=True)
    return {"losses": list(names), **row}


def table(rows: list[dict]) -> str:
    """Return one markdown row per loss: alone, and with clm."""
    alone = {row["losses"][0]: row for row in rows if len(row["losses"]) == 1}
    with_clm = {row["losses"][1]: row for row in rows if len(row["losses"]) == 2}
    first = next((row for row in rows if row["teacher"] is not None), rows[0])  # clm alone has none
    lines = [
        f"teacher {first['teacher'] or math.nan:.3f}, student before the first step {first['fvt']:.3f}",
        "",
        "| loss | alone | with clm |",
        "|---|---|---|",
    ]
    for name, row in alone.items():
        both = f"{with_clm[name]['student']:.3f}" if name in with_clm else ""
        lines.append(f"| `{name}` | {row['student']:.3f} | {both} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
