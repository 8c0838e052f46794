"""Distillation with Lightning, on two tiny models that are made on the spot.

python examples/lightning_loop.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from plain_loop import make_inputs, read_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations import DistillationModule


def main() -> None:
    """Train a few steps and print the last losses."""
    with tempfile.TemporaryDirectory() as scratch:
        student, teacher, text = make_inputs(Path(scratch))
        collator = AlignedCollator(student, teacher, max_length_student=128, max_length_teacher=128)
        module = DistillationModule(
            AutoModelForCausalLM.from_pretrained(student),
            str(teacher),
            collator,
            {"clm": 1.0, "alm_unconstrained": 100.0},
            lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
            accumulate=2,
        )
        loader = DataLoader(read_rows(text), batch_size=4, shuffle=True, collate_fn=collator.collate)
        trainer = Trainer(
            max_steps=6,
            accelerator="auto",
            logger=False,
            enable_checkpointing=False,
            default_root_dir=scratch,
        )
        trainer.fit(module, loader)
        print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
