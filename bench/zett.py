"""Zero-shot transfers: every initialisation to many tokenizers, and the peak memory of one large transfer.

    python bench/zett.py compare --data DATA --output outputs/zett --save bench/results/cpu/zett_compare.json
    python bench/zett.py memory --data DATA --output outputs/zett --save bench/results/cpu/zett_memory.json

`compare` runs `tokenkit zett --compare` for each pair of a model and a target. `memory` saves a random Llama
in bfloat16 with a real tokenizer, moves it with `tokenkit zett` and sets the peak resident memory of that
process, as the operating system has it, against the size of the weights. OUTPUT must not exist.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("stories260K", "babyllama-tok361")
TARGETS = ("gpt2", "llama3", "qwen2.5", "llama2", "tinystories10k", "byte")
COLUMNS = ("fvt", "focus", "omp", "overlap", "mean", "random_normal")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("compare", "memory"))
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, tokenizers/ and text/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    parser.add_argument("--documents", type=int, default=60, help="held-out stories that are scored")
    parser.add_argument("--layers", type=int, default=20, help="of the random Llama (2048 wide)")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    result = compare(arguments) if arguments.what == "compare" else memory(arguments)
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def door(words: list[str]) -> tuple[float, float]:
    """Run `tokenkit zett`; return its seconds and its peak resident memory in MiB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tokenkit.cli", "zett", *words])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"tokenkit zett {' '.join(words)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Score all methods for each model and target, and print the table."""
    data, rows = arguments.data, []
    print("| model, target | original |" + "".join(f" {name} |" for name in COLUMNS))
    print("|---" * (2 + len(COLUMNS)) + "|")
    for model in MODELS:
        for target in arguments.targets:
            folder = arguments.output / f"{model}-{target}"
            tokenizer = target if target == "byte" else str(data / "tokenizers" / target)
            words = ["--model.pretrained-model-name-or-path", str(data / "models" / model)]
            words += ["--target-tokenizer-name", tokenizer, "--output", str(folder), "--compare"]
            words += ["--data", str(data / "text" / "tinystories.train.txt")]
            words += ["--ppl-eval-data", str(data / "text" / "tinystories.heldout.txt")]
            words += ["--max-eval-documents", str(arguments.documents)]
            door(words)
            row = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
            rows.append({**row, "model": model, "target": target, "text": "tinystories.heldout.txt"})
            scores = "".join(f" {row['methods'][name]['bits_per_byte']:.3f} |" for name in COLUMNS)
            print(f"| {model}, {target} | {row['original']:.3f} |{scores}", flush=True)
    return rows


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Move a large random model and print its size and the peak."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = arguments.output / "source"
    config = AutoConfig.for_model(
        "llama",
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=arguments.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(source)
    del model
    for file in (arguments.data / "tokenizers" / "gpt2").iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, source)
    target = str(arguments.data / "tokenizers" / arguments.targets[0])
    words = ["--model.pretrained-model-name-or-path", str(source), "--target-tokenizer-name", target]
    seconds, peak_mib = door([*words, "--output", str(arguments.output / "moved")])
    size_mib = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**20
    moved = (arguments.output / "moved").glob("*.safetensors")
    result = {
        "parameters": parameters,
        "target": arguments.targets[0],
        "weights_mib": round(size_mib),
        "moved_weights_mib": round(sum(file.stat().st_size for file in moved) / 2**20),
        "peak_rss_mib": round(peak_mib),
        "ratio": round(peak_mib / size_mib, 2),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
