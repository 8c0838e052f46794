"""Where Triton does not exist (macOS, Windows), losses and the doors around them work in plain torch.

Windows itself is not at hand: what it lacks is taken away before anything is imported.
"""

import subprocess
import sys
from pathlib import Path

from tests.tiny import byte_level_bpe, tiny_folder

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, signal, sys
for name in ("triton", "triton.language", "fcntl"):
    sys.modules[name] = None
for module, name in ((os, "O_DIRECTORY"), (os, "O_NOFOLLOW"), (signal, "SIGHUP"), (signal, "SIGUSR1")):
    delattr(module, name)
model, target, folder = sys.argv[1:]

import torch
from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.data.collate import AlignedCollator
from tokenkit.losses import alm_loss, clm_loss, uld_loss
from tokenkit.structs import Head, HiddenStates
from tokenkit.tokenization.tokenizer import load_tokenizer

tokenizers = [load_tokenizer(target), load_tokenizer(model)]
batch = AlignedCollator(*tokenizers)([{"text": "The cats sat on the mat, and the dog ran after them."}])
student, teacher = (torch.nn.Embedding(tokenizer.vocab_size, 16) for tokenizer in tokenizers)
teaching = HiddenStates(teacher(batch.teacher.ids_BT).detach(), Head(teacher.weight.detach()))
for loss in (alm_loss, clm_loss, uld_loss):
    learning = HiddenStates(student(batch.student.ids_BT), Head(student.weight))
    term = loss(learning, batch) if loss is clm_loss else loss(learning, teaching, batch)
    student.weight.grad = None
    (term.total / term.count).backward()
    assert torch.isfinite(student.weight.grad).all() and student.weight.grad.abs().sum() > 0, loss

frozen = Head(student.weight.detach())
rows = linear_divergence(student.weight[:5], Head(student.weight), frozen.weight_VD[5:10], frozen, "js")
rows.sum().backward()

import tokenkit.train, tokenkit.training.loop, tokenkit.train_hypernet, tokenkit.commands.pair_stats
from tokenkit.commands import align
from tokenkit.commands import zett

assert align.main(["--student", target, "--teacher", model, "--text", "the cat"]) == 0
flags = ["--model.pretrained-model-name-or-path", model, "--target-tokenizer-name", target]
assert zett.main([*flags, "--output", folder]) == 0
print("all of it")
"""


def test_losses_align_and_zett_work_without_what_windows_lacks(tmp_path):
    """One process of several seconds: what is imported without Triton cannot be imported again with it."""
    tiny_folder(tmp_path / "model")
    byte_level_bpe(tmp_path / "target", 320)
    paths = [str(tmp_path / name) for name in ("model", "target", "moved")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("all of it")
