"""Distillation in a Hugging Face `Trainer`, on two tiny models that are made on the spot.

python examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from plain_loop import make_inputs, read_rows
from transformers import AutoModelForCausalLM, TrainingArguments

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations import DistillationTrainer


def main() -> None:
    """Train a few steps and print what the Trainer logs."""
    with tempfile.TemporaryDirectory() as scratch:
        student, teacher, text = make_inputs(Path(scratch))
        rows = read_rows(text)
        trainer = DistillationTrainer(
            AutoModelForCausalLM.from_pretrained(student),
            TrainingArguments(
                str(Path(scratch) / "trainer"),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=6,
                learning_rate=2e-3,
                logging_steps=3,
                save_strategy="no",
                report_to="none",
            ),
            teacher=str(teacher),
            losses={"clm": 1.0, "alm_unconstrained": 100.0},
            data_collator=AlignedCollator(student, teacher, max_length_student=128, max_length_teacher=128),
            train_dataset=rows[8:],
            eval_dataset=rows[:8],
        )
        trainer.train()
        print(
            {name: round(value, 4) for name, value in trainer.evaluate().items() if "per_second" not in name}
        )


if __name__ == "__main__":
    main()
