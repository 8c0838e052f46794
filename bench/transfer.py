"""Real transfers, one trainer run each: what FVT, CLM, ALM and ALM + CLM are worth after equal steps.

    python bench/transfer.py --data DATA --output outputs/transfer --save bench/results/cpu/transfer.json

Every run is `python -m tokenkit.train` in a process of its own; its wall time and its peak resident
memory are the operating system's. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from harness import machine

from tokenkit.run.metrics import read_metrics

LOSSES = {
    "CLM": ["--losses", "clm"],
    "ALM": ["--losses", "alm_unconstrained"],
    # the temperature of 100 divides ALM's gradient: the weight gives it back
    "ALM + CLM": ["--losses", "clm", "alm_unconstrained", "--loss-weights", "1", "100"],
}
TARGETS = ("tinystories10k", "byte", "gpt2", "llama3", "qwen2.5")
MODES = ("full", "lora")


def main() -> None:
    """Run the matrix and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, tokenizers/ and text/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    rows = []
    for target in arguments.targets:
        for mode in arguments.modes:
            for name, losses in LOSSES.items():
                folder = arguments.output / f"{target}-{mode}-{name.replace(' + ', '-').lower()}"
                row = run(flags(arguments, target, mode, losses, folder), folder)
                rows.append({"target": target, "mode": mode, "losses": name, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")


def flags(
    arguments: argparse.Namespace, target: str, mode: str, losses: list[str], folder: Path
) -> list[str]:
    """Return the command line of one run."""
    tokenizer = "byte" if target == "byte" else str(arguments.data / "tokenizers" / target)
    length = 512 if target == "byte" else 192
    settings = {
        "student.pretrained-model-name-or-path": arguments.data / "models" / arguments.model,
        "target-tokenizer-name": tokenizer,
        "train-model-mode": mode,
        "data.dataset-name": arguments.data / "text" / "tinystories.train.txt",
        "ppl-eval-data": folder.parent / "heldout.txt",
        "max-length-teacher": 256,
        "max-length-new": length,
        "batch-size": 8,
        "steps": arguments.steps,
        "warmup-steps": 10,
        "optimizer.learning-rate": 2e-3,
        "eval-interval": arguments.steps,
        "save-interval": arguments.steps,
        "output-dir": folder,
    }
    heldout = folder.parent / "heldout.txt"
    if not heldout.exists():
        stories = (arguments.data / "text" / "tinystories.heldout.txt").read_text(encoding="utf-8")
        heldout.write_text("<|endoftext|>\n".join(stories.split("<|endoftext|>\n")[:60]), encoding="utf-8")
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*words, *losses, "--eval-at-step-zero"]


def run(command: list[str], folder: Path) -> dict[str, float]:
    """Train once; return bits per byte, seconds and peak memory."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tokenkit.train", *command], stderr=subprocess.PIPE)
    assert process.stderr is not None
    words = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{words[-2000:]}")
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "bits_per_byte/student" in line]
    return {
        "teacher": lines[0].get("bits_per_byte/teacher"),
        "fvt": lines[0]["bits_per_byte/student"],
        "student": lines[-1]["bits_per_byte/student"],
        "heldout_bytes": lines[0]["heldout_bytes"],
        "steps": lines[-1]["step"],
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def table(rows: list[dict]) -> str:
    """Return one markdown row per target and mode."""
    lines = [
        "| target | trained | teacher | FVT | CLM | ALM | ALM + CLM | seconds | peak MiB |",
        "|---" * 9 + "|",
    ]
    for start in range(0, len(rows), len(LOSSES)):
        group = rows[start : start + len(LOSSES)]
        first = next(row for row in group if row["teacher"] is not None)  # clm alone has none
        head = f"| {first['target']} | {first['mode']} | {first['teacher']:.3f} | {first['fvt']:.3f} "
        students = " | ".join(f"{row['student']:.3f}" for row in group)
        seconds = " / ".join(f"{row['seconds']:.0f}" for row in group)
        peak = max(row["peak_mib"] for row in group)
        lines.append(f"{head}| {students} | {seconds} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
