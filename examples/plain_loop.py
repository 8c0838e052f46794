"""tokenkit's losses in a plain PyTorch loop: a student learns from a teacher with another tokenizer.

    python examples/plain_loop.py
    python examples/plain_loop.py --student A --teacher B --text my.jsonl

Only the collator and the losses are tokenkit's. Without folders, two tiny models are made on the spot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from quickstart import make_model, train_tokenizer, write_documents
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from tokenkit.data.collate import AlignedCollator
from tokenkit.losses import alm_loss, clm_loss
from tokenkit.structs import Head, HiddenStates
from tokenkit.tokenization.byteify import load_tokenizer


def main() -> None:
    """Train a few steps and print the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, help="folder of the model that learns")
    parser.add_argument("--teacher", type=Path, help="folder of the model that it learns from")
    parser.add_argument("--text", type=Path, help="jsonl with a field `text`")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = (arguments.student, arguments.teacher, arguments.text)
        student, teacher, text = folders if all(folders) else make_inputs(Path(scratch))
        distill(student, teacher, text, arguments.steps)


def distill(student_folder: Path, teacher_folder: Path, text: Path, steps: int) -> list[float]:
    """Minimise CLM + ALM for some steps; return the sum of both at each."""
    student = AutoModelForCausalLM.from_pretrained(student_folder)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    tokenizers = load_tokenizer(str(student_folder)), load_tokenizer(str(teacher_folder))
    collator = AlignedCollator(*tokenizers, max_length_student=128, max_length_teacher=128)
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    batches = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collator, generator=torch.Generator())
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)

    values = []
    for step, batch in zip(range(steps), batches, strict=False):
        with torch.no_grad():
            teacher_states = hidden_states(teacher, batch.teacher.ids_BT)
        student_states = hidden_states(student, batch.student.ids_BT)
        clm = clm_loss(student_states, batch)
        alm = alm_loss(student_states, teacher_states, batch)
        loss = clm.total / clm.count + alm.total / alm.count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
        print(f"step {step:3d}  clm {clm.total / clm.count:.4f}  alm {alm.total / alm.count:.4f}")
    return values


def hidden_states(model, ids_BT: torch.Tensor) -> HiddenStates:
    """Stop at the hidden states: the head goes to the losses as a matrix, its logits are never formed."""
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return HiddenStates(hidden_BTD, Head(model.get_output_embeddings().weight))


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Make two tiny models with different tokenizers, and text."""
    write_documents(folder / "text.jsonl")
    for name, vocab_size, split_digits in (("student", 1200, True), ("teacher", 800, False)):
        train_tokenizer(folder / "text.jsonl", folder / name, vocab_size, split_digits=split_digits)
        make_model(folder / name, vocab_size)
    return folder / "student", folder / "teacher", folder / "text.jsonl"


if __name__ == "__main__":
    main()
