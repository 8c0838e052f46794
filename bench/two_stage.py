"""What to do first: adapters at once, embeddings before adapters, or a prefix stage, after equal steps.

    python bench/two_stage.py --data DATA --output outputs/two_stage --save bench/results/cpu/two_stage.json

A plan is one or two runs of `python -m tokenkit.train`, each in a process of its own; the second begins with
the export of the first, and its teacher is the original model. Every run starts a schedule of its own. Prints
a markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from harness import machine
from transfer import LOSSES, flags, run


class Stage(NamedTuple):
    """One run: what it trains, its share of all steps, and further flags."""

    mode: str
    share: float
    more: tuple[str, ...] = ()


def prefix(share: float) -> tuple[str, ...]:
    """Return the flags of a prefix stage of one layer that takes a share of the run's steps."""
    return ("--n-prefix-layers", "1", "--prefix-lr", "PREFIX_LR", "--prefix-steps", f"SHARE {share}")


PLANS: dict[str, tuple[Stage, ...]] = {
    "LoRA": (Stage("lora", 1.0),),
    "embeddings": (Stage("none", 1.0),),
    "embeddings 25 %, LoRA": (Stage("none", 0.25), Stage("lora", 0.75)),
    "embeddings 50 %, LoRA": (Stage("none", 0.5), Stage("lora", 0.5)),
    "prefix 10 %, LoRA": (Stage("lora", 1.0, prefix(0.1)),),
    "prefix 25 %, LoRA": (Stage("lora", 1.0, prefix(0.25)),),
}


def main() -> None:
    """Run every plan with every seed and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, tokenizers/ and text/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--save", type=Path, help="JSON with every figure; rows that it holds are kept")
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--target", default="tinystories10k")
    parser.add_argument("--steps", type=int, default=100, help="of all stages of a plan together")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3, 1e-2], help="learning rates")
    parser.add_argument("--prefix-rate", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {key: getattr(arguments, key) for key in ("model", "target", "steps", "prefix_rate")}
    rows = held(arguments.save, facts)
    for seed in arguments.seeds:
        for name in arguments.plans:
            for rate in arguments.rates:
                if (name, rate, seed) in [(row["plan"], row["rate"], row["seed"]) for row in rows]:
                    continue
                rows.append(measure(arguments, name, rate, seed))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if arguments.save:
                    arguments.save.parent.mkdir(parents=True, exist_ok=True)
                    content = {"machine": machine("cpu"), "settings": facts, "rows": rows}
                    arguments.save.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


def held(path: Path | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that the JSON holds already: an interrupted bench goes on behind them."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["settings"] != facts:
        raise SystemExit(f"{path} holds rows of other settings, {content['settings']}: name another file")
    return content["rows"]


def measure(arguments: argparse.Namespace, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Run the stages of a plan, one after the other; return bits per byte behind each."""
    done: list[dict[str, float]] = []
    folder: Path | None = None
    for number, stage in enumerate(PLANS[name]):
        steps = round(stage.share * arguments.steps)
        before, folder = folder, arguments.output / f"{list(PLANS).index(name)}-{rate:g}-{seed}-{number}"
        asked = argparse.Namespace(**{**vars(arguments), "steps": steps})
        words = flags(asked, arguments.target, stage.mode, LOSSES["ALM + CLM"], folder)
        if before is not None:
            words = without(words, "--target-tokenizer-name")
            words += ["--student.pretrained-model-name-or-path", str(before / "export")]
            original = arguments.data / "models" / arguments.model
            words += ["--teacher.pretrained-model-name-or-path", str(original)]
        words += ["--optimizer.learning-rate", str(rate), "--seed", str(seed)]
        words += ["--warmup-steps", str(min(10, steps // 2))]
        done.append(run([*words, *spelled(stage.more, arguments.prefix_rate, steps)], folder))
    return {
        "plan": name,
        "rate": rate,
        "seed": seed,
        "teacher": done[0]["teacher"],
        "fvt": done[0]["fvt"],
        "stages": [stage["student"] for stage in done],
        "student": done[-1]["student"],
        "heldout_bytes": [stage["heldout_bytes"] for stage in done],
        "seconds": round(sum(stage["seconds"] for stage in done), 1),
        "peak_mib": max(stage["peak_mib"] for stage in done),
    }


def without(words: list[str], flag: str) -> list[str]:
    """Return the command line without a flag and its value."""
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


def spelled(words: tuple[str, ...], prefix_rate: float, steps: int) -> list[str]:
    """Put numbers where a plan names a share of the steps, or the prefix stage's rate."""
    return [
        str(round(float(word.split()[1]) * steps)) if word.startswith("SHARE")
        else str(prefix_rate) if word == "PREFIX_LR"
        else word
        for word in words
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return one markdown row per plan and rate: the mean over seeds, and the lowest and highest of them."""
    lines = [
        "| plan | learning rate | bits per byte | lowest, highest seed | seconds | peak MiB |",
        "|---" * 6 + "|",
    ]
    for name, rate in dict.fromkeys((row["plan"], row["rate"]) for row in rows):
        group = [row for row in rows if (row["plan"], row["rate"]) == (name, rate)]
        found = [row["student"] for row in group]
        seconds = statistics.mean(row["seconds"] for row in group)
        peak = max(row["peak_mib"] for row in group)
        lines.append(
            f"| {name} | {rate:g} | {statistics.mean(found):.3f} | {min(found):.3f}, {max(found):.3f} "
            f"| {seconds:.0f} | {peak} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
