"""How much ALM should weigh beside CLM, and how fast adapters should learn, under the shipped configuration.

    python bench/defaults.py --data DATA --output outputs/defaults --save bench/results/cpu/defaults.json

Each run is configs/cross_tokenizer_distill.yaml on a real small model, with few steps. Texts: stories like
the teacher's own, 40 of them repeated, and Wikipedia; held-out stories are measured. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import machine

from tokenkit.run.metrics import read_metrics
from tokenkit.train import main as train

CONFIG = Path(__file__).parents[1] / "configs" / "cross_tokenizer_distill.yaml"
BREAK = "<|endoftext|>\n"
TEXTS = ("own", "little", "elsewhere")


class Plan(NamedTuple):
    """Weights of CLM and ALM, and how their gradients are joined."""

    weights: tuple[float, float]
    joined: str | None = None


PLANS = {
    "CLM": Plan((1, 0)),
    "1, 1": Plan((1, 1)),
    "1, 10": Plan((1, 10)),
    "1, 100": Plan((1, 100)),
    "ALM": Plan((0, 1)),
    "approx_gradmag_preserve_mag": Plan((1, 1), "approx_gradmag_preserve_mag"),
    "gradmag": Plan((1, 1), "gradmag"),
}


def main() -> None:
    """Run what the JSON does not hold yet and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, tokenizers/ and text/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--save", type=Path, required=True, help="JSON with every figure; its rows are kept")
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--target", default="tinystories10k")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    write_texts(arguments.data / "text", arguments.output)
    rows = json.loads(arguments.save.read_text())["rows"] if arguments.save.exists() else []
    common = {name: getattr(arguments, name) for name in ("model", "target", "steps")}
    asked = (arguments.seeds, arguments.texts, arguments.rates, arguments.plans)
    for chosen in itertools.product(*asked):
        case = common | dict(zip(("seed", "text", "rate", "plan"), chosen, strict=True))
        if any(case.items() <= row.items() for row in rows):
            continue
        rows.append(case | measure(arguments, case))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")
    print(table(rows))


def write_texts(source: Path, output: Path) -> None:
    """Write the three training texts and the held-out stories."""
    output.mkdir(parents=True, exist_ok=True)
    stories = (source / "tinystories.train.txt").read_text(encoding="utf-8").split(BREAK)
    heldout = (source / "tinystories.heldout.txt").read_text(encoding="utf-8").split(BREAK)
    paragraphs = (source / "wikitext2.valid.txt").read_text(encoding="utf-8").splitlines()
    chosen = {
        "own": stories,
        "little": stories[:40],
        "elsewhere": [line.strip() + "\n" for line in paragraphs if len(line) > 200],
        "heldout": heldout[:40],
    }
    for name, documents in chosen.items():
        (output / f"{name}.txt").write_text(BREAK.join(documents), encoding="utf-8")


def measure(arguments: argparse.Namespace, case: dict[str, Any]) -> dict[str, float]:
    """Train once; return bits per byte before and after, and seconds."""
    plan, steps = PLANS[case["plan"]], case["steps"]
    folder = arguments.output / f"{time.time_ns()}"
    settings = {
        "student.pretrained-model-name-or-path": arguments.data / "models" / case["model"],
        "target-tokenizer-name": arguments.data / "tokenizers" / case["target"],
        "data.dataset-name": arguments.output / f"{case['text']}.txt",
        "data.heldout.fraction": 0,
        "ppl-eval-data": arguments.output / "heldout.txt",
        "max-length-teacher": 256,
        "max-length-new": 192,
        "batch-size": 8,
        "gradient-accumulation-steps": 1,
        "dtype": "float32",
        "seed": case["seed"],
        "steps": steps,
        "warmup-steps": steps // 10,
        "eval-interval": steps,
        "save-interval": steps,
        "optimizer.learning-rate": case["rate"],
        "output-dir": folder,
    }
    if plan.joined:
        settings["multitask-aggregation-fn"] = plan.joined
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words += ["--loss-weights", *map(str, plan.weights), "--eval-at-step-zero"]
    began = time.process_time()
    if train(["--config", str(CONFIG), *words]):
        raise SystemExit(f"{case} failed")
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "bits_per_byte/student" in line]
    first, last = lines[0], lines[-1]
    return {
        "teacher": first["bits_per_byte/teacher"],
        "fvt": first["bits_per_byte/student"],
        "student": last["bits_per_byte/student"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return one markdown row per plan, pair and rate; a column per text, the mean over its seeds."""
    lines = ["| pair | rate | weights | own | little | elsewhere |", "|---" * 6 + "|"]
    heads = {(row["model"], row["target"], row["rate"], row["plan"]): None for row in rows}
    for model, target, rate, plan in heads:
        same = {"model": model, "target": target, "rate": rate, "plan": plan}
        means = []
        for text in TEXTS:
            found = [row["student"] for row in rows if (same | {"text": text}).items() <= row.items()]
            means.append(f"{statistics.mean(found):.3f} ({len(found)})" if found else "")
        lines.append(f"| {model} to {target} | {rate:g} | {plan} | " + " | ".join(means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
