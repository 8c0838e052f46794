"""Zero-shot transfers: every initialisation to many tokenizers, and the peak memory of one large transfer.

    python bench/zett.py compare --data DATA --output outputs/zett --save bench/results/cpu/zett_compare.json
    python bench/zett.py memory --data DATA --output outputs/zett --save bench/results/cpu/zett_memory.json

`compare` runs `tokenkit zett --compare` for each pair of a model and a target. `memory` saves random Llamas
in bfloat16 with GPT-2's tokenizer, moves each with `tokenkit zett` and sets the peak resident memory of that
process (VmHWM) against the size of the weights; the weights are removed again. OUTPUT must not exist.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from harness import run_command, save

MODELS = ("stories260K", "babyllama-tok361")
TARGETS = ("gpt2", "llama3", "qwen2.5", "llama2", "tinystories10k", "byte")
COLUMNS = ("fvt", "focus", "omp", "overlap", "mean", "random_normal")
SIZES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
}
"""Of the random Llamas; 4 heads of keys and values, 50304 rows, head untied."""


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
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="for memory")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="memory takes the first")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    if arguments.what == "compare":
        rows = compare(arguments)
    else:
        rows = [memory(arguments, size) for size in arguments.sizes]
    if arguments.save:
        save(arguments.save, "cpu", rows)


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
            run_command("zett", words)
            row = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
            rows.append({**row, "model": model, "target": target, "text": "tinystories.heldout.txt"})
            scores = "".join(f" {row['methods'][name]['bits_per_byte']:.3f} |" for name in COLUMNS)
            print(f"| {model}, {target} | {row['original']:.3f} |{scores}", flush=True)
    return rows


def memory(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    """Move a large random model and print its size and the peak."""
    folder, target = arguments.output / size, arguments.targets[0]
    source, moved = folder / "source", folder / "moved"
    parameters = save_random(arguments, size, source)
    words = ["--model.pretrained-model-name-or-path", str(source)]
    words += ["--target-tokenizer-name", str(arguments.data / "tokenizers" / target), "--output", str(moved)]
    cpu_s, wall_s, peak_mib = run_command("zett", words)
    size_mib, moved_mib = (
        sum(file.stat().st_size for file in place.glob("*.safetensors")) / 2**20 for place in (source, moved)
    )
    shutil.rmtree(folder)
    result = {
        "parameters": parameters,
        "target": target,
        "weights_mib": round(size_mib),
        "moved_weights_mib": round(moved_mib),
        "peak_rss_mib": peak_mib,
        "ratio": round(peak_mib / size_mib, 2),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
    }
    print(json.dumps(result), flush=True)
    return result


def save_random(arguments: argparse.Namespace, size: str, folder: Path) -> int:
    """Write a random Llama with GPT-2's tokenizer; return how many parameters it has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=50304, num_key_value_heads=4, max_position_embeddings=512, **SIZES[size]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in (arguments.data / "tokenizers" / "gpt2").iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, folder)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
