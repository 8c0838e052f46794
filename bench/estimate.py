"""Memory that `tokenkit estimate` says against that of real steps, each case in a process of its own.

    OMP_NUM_THREADS=1 python bench/estimate.py
    OMP_NUM_THREADS=1 python bench/estimate.py --case full

Measured is the peak of the resident set over two steps, above what is there before the models are loaded,
with the models themselves. What is freed is given back at once there.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import _resident_bytes, machine, peak_bytes

CASES = {
    "full": ["--train-model-mode", "full", "--losses", "clm"],
    "full, checkpointing": [
        "--train-model-mode", "full", "--losses", "clm", "--gradient-checkpointing", "true",
    ],
    "full, teacher": ["--train-model-mode", "full", "--losses", "alm_unconstrained"],
    "lora, ALM": ["--train-model-mode", "lora", "--losses", "alm_unconstrained"],
    "embeddings, CLM and ALM": ["--train-model-mode", "none", "--losses", "clm", "alm_unconstrained"],
    "lora, bfloat16": ["--train-model-mode", "lora", "--losses", "clm", "--dtype", "bfloat16"],
    "full, 2 micro-batches": [
        "--train-model-mode", "full", "--losses", "clm", "--gradient-accumulation-steps", "2",
    ],
}  # fmt: skip
MIB = 2**20


def flags(folder: Path) -> list[str]:
    """Return what all cases share; make the model and the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenkit.tokenization.tokenizer import load_tokenizer

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    if not (folder / "model").is_dir():
        LlamaForCausalLM(LlamaConfig(vocab_size=16384, **sizes)).save_pretrained(folder / "model")
        load_tokenizer("byte:target=Gemma2").save(folder / "model")
        text = " ".join(f"The tokenizers cut text {i} where they like." for i in range(400))
        (folder / "text.txt").write_text("\n\n".join([text] * 64), encoding="utf-8")
    return [
        "--student", str(folder / "model"), "--target", "byte:target=Llama3", "--data",
        str(folder / "text.txt"), "--data.heldout.fraction", "0", "--data.num-workers", "0", "--output",
        str(folder / "run"), "--batch-size", "8", "--max-length-new", "512", "--max-length-teacher", "512",
        "--steps", "2", "--dry-run", "true", "--loss-workspace-mib", "64", "--pad-to-multiple-of", "16384",
    ]  # fmt: skip


def measure(words: list[str]) -> tuple[float, float]:
    """Return estimate and measurement in MiB."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401  what they load is no model

    from tokenkit.config import ALIASES, TrainConfig, parse_command_line
    from tokenkit.parallel import start
    from tokenkit.training.build import build
    from tokenkit.training.estimate import estimate
    from tokenkit.training.step import train_step

    config = parse_command_line(TrainConfig, words, program="bench", aliases=ALIASES)
    expected = estimate(config, 1)
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes()
    parts = build(config, start())
    ctypes.CDLL(None).malloc_trim(0)
    loaded = _resident_bytes()

    def steps() -> None:
        for step in range(2):
            parts.run.step = step
            train_step(parts.run, next(parts.batches))

    return expected.peak / MIB, (loaded - before + peak_bytes(steps, "cpu")) / MIB


def run() -> None:
    """Print a table of all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure([*flags(Path(arguments.one)), *CASES[arguments.case]])))
        return
    print(json.dumps(machine("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        flags(Path(folder))
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # else freed tensors stay resident
        for case in [arguments.case] if arguments.case else CASES:
            command = [sys.executable, __file__, "--case", case, "--one", folder]
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
            expected, found = json.loads(out.splitlines()[-1])
            print(f"{case:<26} said {expected:7.0f} MiB   measured {found:7.0f} MiB   {expected / found:.2f}")


if __name__ == "__main__":
    run()
