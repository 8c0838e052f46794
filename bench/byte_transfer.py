"""Real transfers to bytes, one trainer run each: what expansion, latents and a head of its own are worth.

    python bench/byte_transfer.py --data DATA --output outputs/bytes --plot docs/bytes.png

Every run is `python -m tokenkit.train` in a process of its own. The exported folder is then loaded in
another process that cannot import tokenkit, where it writes on from a prompt, greedily, with and without a
cache. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import save

from tokenkit.run.metrics import read_metrics

# the temperature of 100 divides ALM's gradient: the weight gives it back
PLAIN = ["--losses", "clm", "alm_unconstrained", "--loss-weights", "1", "100"]
LATENTS = ["--losses", "clm", "alm_unconstrained", "alm_latents", "--loss-weights", "1", "100", "1"]
EXPAND = ["--expand-input-ids", "true"]
MODELS = {"stories260K": 2e-3, "babyllama-tok361": 5e-4}
"""The learning rate of each: twice the width, and tokens that are characters, bear less."""
WAYS = {
    "plain": PLAIN,
    "expanded": [*PLAIN, *EXPAND],
    "expanded, latents": [*LATENTS, *EXPAND],
    "expanded, untied": [*PLAIN, *EXPAND, "--output-embeddings-mode", "untie"],
}
PROMPT = "Once upon a time, there was a"
GENERATE = """
import json, sys, time
sys.modules["tokenkit"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, trust, prompt, new = sys.argv[1], sys.argv[2] == "1", sys.argv[3], int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
ids = tokenizer(prompt, return_tensors="pt").input_ids
found, seconds = [], []
for use_cache in (True, False):
    began = time.process_time()
    found.append(model.generate(ids, do_sample=False, max_new_tokens=new, use_cache=use_cache)[0])
    seconds.append((time.process_time() - began) / (len(found[-1]) - ids.shape[1]) * 1000)
print(json.dumps({
    "class": type(model).__name__, "text": tokenizer.decode(found[0], skip_special_tokens=True),
    "same_without_cache": found[0].tolist() == found[1].tolist(),
    "ms_per_byte": round(seconds[0], 2), "ms_per_byte_without_cache": round(seconds[1], 2),
}))
"""


def main() -> None:
    """Run the matrix, print the table, write JSON and the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--save", type=Path, default=Path("bench/results/cpu/bytes.json"))
    parser.add_argument("--plot", type=Path, help="PNG with bits per byte over steps")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--stories", type=int, default=60, help="held-out stories that are measured")
    parser.add_argument("--new-bytes", type=int, default=160)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    stories = (arguments.data / "text" / "tinystories.heldout.txt").read_text(encoding="utf-8")
    heldout = "<|endoftext|>\n".join(stories.split("<|endoftext|>\n")[: arguments.stories])
    (arguments.output / "heldout.txt").write_text(heldout, encoding="utf-8")
    rows = []
    for model in arguments.models:
        for way in arguments.ways:
            rows.append({"model": model, "way": way, **transfer(arguments, model, way)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    command = shlex.join(["python", *sys.argv])
    save(arguments.save, "cpu", {"command": command, "prompt": PROMPT, "rows": rows})
    if arguments.plot:
        plot(rows, arguments.plot)


def transfer(arguments: argparse.Namespace, model: str, way: str) -> dict[str, Any]:
    """Train once; return what was measured, and what the exported folder writes."""
    folder = arguments.output / f"{model}-{way.replace(', ', '-')}"
    source = arguments.data / "models" / model
    positions = json.loads((source / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    settings = {
        "student.pretrained-model-name-or-path": source,
        "target-tokenizer-name": "byte",
        "train-model-mode": "full",
        "data.dataset-name": arguments.data / "text" / "tinystories.train.txt",
        "ppl-eval-data": arguments.output / "heldout.txt",
        "max-length-teacher": min(256, positions),
        "max-length-new": min(512, positions),
        "batch-size": 8,
        "steps": arguments.steps,
        "warmup-steps": min(10, arguments.steps // 2),
        "optimizer.learning-rate": MODELS[model],
        "eval-interval": max(1, arguments.steps // 8),
        "save-interval": arguments.steps,
        "output-dir": folder,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenkit.train", *words, *WAYS[way], "--eval-at-step-zero"],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{model}, {way} failed:\n{said[-2000:]}")
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "bits_per_byte/student" in line]
    return {
        "teacher": lines[0].get("bits_per_byte/teacher"),
        "curve": [[line["step"], line["bits_per_byte/student"]] for line in lines],
        "heldout_bytes": lines[0]["heldout_bytes"],
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "export_bytes": sum(path.stat().st_size for path in (folder / "export").glob("*.safetensors")),
        "generated": generate(folder / "export", "expanded" in way, arguments.new_bytes),
    }


def generate(folder: Path, trust: bool, new_bytes: int) -> dict[str, Any]:
    """Return what the folder writes in a process without tokenkit."""
    command = [sys.executable, "-c", GENERATE, str(folder), str(int(trust)), PROMPT, str(new_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder} does not generate:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Return one markdown row per model and way."""
    lines = [
        "| model | way | teacher | step 0 | half | end | CPU seconds | peak MiB "
        "| ms per byte generated, cache / none |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        curve = [value for _, value in row["curve"]]
        made = row["generated"]
        lines.append(
            f"| {row['model']} | {row['way']} | {row['teacher']:.3f} | {curve[0]:.3f} "
            f"| {curve[len(curve) // 2]:.3f} | {curve[-1]:.3f} | {row['cpu_seconds']:.0f} "
            f"| {row['peak_mib']} | {made['ms_per_byte']:.1f} / {made['ms_per_byte_without_cache']:.1f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw bits per byte over steps, one panel per model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.2 * len(models), 3.4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for row in own:
            panel.plot(*zip(*row["curve"], strict=True), label=row["way"])
        panel.axhline(own[0]["teacher"], color="black", linestyle=":", label="teacher, its own tokens")
        panel.set(title=model, xlabel="steps", yscale="log", ylabel="bits per byte, held out")
        panel.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
