"""Distillation in a plain PyTorch loop: a student learns from a teacher with another tokenizer.

    python examples/plain_loop.py
    python examples/plain_loop.py --student A --teacher B --text my.jsonl

Without folders, two tiny models are made on the spot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from quickstart import docstrings, make_model, pieces, train_tokenizer, write
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations import Distiller


def main() -> None:
    """Train a few steps and print the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, help="folder of the model that learns")
    parser.add_argument("--teacher", type=Path, help="folder of the model that it learns from")
    parser.add_argument("--text", type=Path, help="jsonl with a field `text`")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = (arguments.student, arguments.teacher, arguments.text)
        student, teacher, text = folders if all(folders) else make_inputs(Path(scratch))
        distill(student, teacher, read_rows(text), arguments.steps)


def distill(student: Path, teacher: Path, rows: list[Any], steps: int, micro_batches: int = 2) -> None:
    """Minimise CLM + 100 ALM for some steps of several micro-batches each."""
    model = AutoModelForCausalLM.from_pretrained(student).train()
    collator = AlignedCollator(student, teacher, max_length_student=128, max_length_teacher=128)
    distiller = Distiller(model, teacher, collator, {"clm": 1.0, "alm_unconstrained": 100.0})
    batches = iter(DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collator.collate))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        values = distiller.backward(model, [next(batches) for _ in range(micro_batches)])
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Make two tiny models with different tokenizers, and text."""
    write(folder / "text.jsonl", islice(pieces(docstrings()), 1_500))
    for name, vocab_size, split_digits in (("student", 1200, True), ("teacher", 800, False)):
        train_tokenizer(folder / "text.jsonl", folder / name, vocab_size, split_digits=split_digits)
        make_model(folder / name, vocab_size)
    return folder / "student", folder / "teacher", folder / "text.jsonl"


def read_rows(text: Path) -> list[Any]:
    """Read a jsonl file."""
    return [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
