"""A hypernetwork against fast vocabulary transfer: bits per byte on tokenizers that it has not seen.

    tokenkit train-hypernet --model.pretrained-model-name-or-path stories260K ... --output hypernet
    python bench/hypernet.py --data $TOKENKIT_DATA --hypernet hypernet --save bench/results/cpu/hypernet.json

Each target is scored on the same held-out stories, at the start and after nothing else: no weight of the
body moves. `old` is the model under its own tokenizer, over the same bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from harness import machine

TARGETS = ("tinystories10k", "tinystories-spm", "gpt2", "pythia", "llama2", "llama3", "qwen2.5", "byte")


def main() -> None:
    """Score every target and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, tokenizers/ and text/")
    parser.add_argument("--hypernet", type=Path, required=True, help="what train-hypernet wrote")
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--stories", type=int, default=60)
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    arguments = parser.parse_args()
    rows = [score(arguments, target) for target in arguments.targets]
    print("| target | tokens | old | FVT | hypernetwork | hypernetwork's share |\n" + "|---" * 6 + "|")
    for row in rows:
        closed = (row["fvt"] - row["hypernet"]) / (row["fvt"] - row["old"])
        print(
            f"| {row['target']} | {row['tokens']} | {row['old']:.3f} | {row['fvt']:.3f} "
            f"| {row['hypernet']:.3f} | {closed:.0%} |"
        )
    if arguments.save:
        about = json.loads((arguments.hypernet / "hypernet.json").read_text(encoding="utf-8"))
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine("cpu"), "hypernet": about, "rows": rows}
        arguments.save.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def score(arguments: argparse.Namespace, target: str) -> dict:
    """Return bits per byte of FVT and of the hypernetwork under one target tokenizer."""
    from tokenkit.data.collate import AlignedCollator
    from tokenkit.data.mix import read_documents
    from tokenkit.data.options import SourceOptions
    from tokenkit.embeddings.transfer import InitOptions, transfer_vocabulary
    from tokenkit.evaluation.bits_per_byte import bits_per_byte, heldout_batches
    from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
    from tokenkit.parallel import start, stop
    from tokenkit.tokenization.tokenizer import load_tokenizer
    from tokenkit.training.distillation import Distillation

    folder = arguments.data / "models" / arguments.model
    old = load_tokenizer(str(folder))
    new = load_tokenizer("byte" if target == "byte" else str(arguments.data / "tokenizers" / target))
    heldout = arguments.data / "text" / "tinystories.heldout.txt"
    documents = read_documents(SourceOptions(path=str(heldout)), arguments.stories)
    length = 512 if target == "byte" else 192
    collator = AlignedCollator(new, old, max_length_student=length, max_length_teacher=256)
    batches = heldout_batches(documents, collator)
    options = InitOptions(hypernet=str(arguments.hypernet))
    row: dict = {"target": target, "tokens": new.vocab_size}
    world = start()
    for name in ("fvt", "hypernet"):
        model = load_causal_lm(str(folder), old.vocab_size, LoadOptions())
        teacher = model.vocabulary()
        began = time.perf_counter()
        transfer_vocabulary(model, old, new, output_embeddings="untie", method=name, options=options)
        row[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
        found = bits_per_byte(Distillation(model, teacher, {}), batches, world)
        row.update({name: found.student, "old": found.teacher, "heldout_bytes": found.num_bytes})
    stop(world)
    return row


if __name__ == "__main__":
    main()
