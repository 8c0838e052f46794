"""tokenkit's losses in a Hugging Face `Trainer`: override `compute_loss`, pass the collator.

    python examples/hf_trainer.py

Only the collator and the losses are tokenkit's. Two tiny models are made on the spot.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from plain_loop import hidden_states, make_inputs
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tokenkit.data.collate import AlignedCollator
from tokenkit.losses import alm_loss, clm_loss
from tokenkit.tokenization.byteify import load_tokenizer


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is CLM + ALM against a teacher with another tokenizer."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """Return the loss of one batch."""
        batch = inputs["batch"].to(self.args.device)
        with torch.no_grad():
            teacher = hidden_states(self.teacher, batch.teacher.ids_BT)
        student = hidden_states(model, batch.student.ids_BT)
        terms = (clm_loss(student, batch), alm_loss(student, teacher, batch))
        return sum(term.total / term.count for term in terms)


def main() -> None:
    """Train a few steps and print what the Trainer logs."""
    with tempfile.TemporaryDirectory() as scratch:
        student_folder, teacher_folder, text = make_inputs(Path(scratch))
        collator = AlignedCollator(
            load_tokenizer(str(student_folder)),
            load_tokenizer(str(teacher_folder)),
            max_length_student=128,
            max_length_teacher=128,
        )
        trainer = DistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(student_folder),
            teacher=AutoModelForCausalLM.from_pretrained(teacher_folder),
            args=TrainingArguments(
                output_dir=str(Path(scratch) / "trainer"),
                per_device_train_batch_size=8,
                max_steps=12,
                learning_rate=2e-3,
                logging_steps=3,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,  # the collator reads the rows as they are
            ),
            train_dataset=[json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()],
            data_collator=lambda rows: {"batch": collator(rows)},
        )
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print("loss:", " -> ".join(f"{value:.3f}" for value in logged))


if __name__ == "__main__":
    main()
