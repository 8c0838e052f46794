"""A stage of `gpu_check.py`: a real training run under CUDA's synchronisation alarm and torch's profiler."""

from __future__ import annotations

import collections
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

STEPS = 6


def measure_step(stage: Any) -> None:
    """Train a random model for a few steps; write what made the host wait, and the longest kernels."""
    from tokenkit.train import main

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder, small=stage.dry_run)
        flags = [
            *("--student.pretrained-model-name-or-path", str(folder / "model")),
            *("--target-tokenizer-name", "byte", "--data.dataset-name", str(folder / "text.txt")),
            *("--losses", "clm", "alm_unconstrained", "--train-model-mode", "full"),
            *("--steps", str(2 if stage.dry_run else STEPS), "--batch-size", "4" if stage.dry_run else "16"),
            *("--dtype", "float32" if stage.dry_run else "bfloat16", "--warmup-steps", "1"),
            *("--output-dir", str(folder / "run"), "--data.heldout.documents", "0"),
        ]
        found: collections.Counter[str] = collections.Counter()
        if stage.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        show = warnings.showwarning

        def count(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if "synchroniz" not in str(message):
                show(message, category, filename, lineno, *rest)
                return
            frames = traceback.extract_stack()[:-1]
            ours = [f for f in frames if "tokenkit" in f.filename and "bench" not in f.filename]
            last = ours[-1] if ours else frames[-1]
            found[f"{Path(last.filename).name}:{last.lineno} {last.name}"] += 1

        activities = [torch.profiler.ProfilerActivity.CUDA] if stage.device == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = count
            began = time.perf_counter()
            with torch.profiler.profile(activities=activities) as profile:
                code = main(flags)
            seconds = time.perf_counter() - began
        if stage.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        if code:
            sys.exit(code)
        stage.add("a run", headline=True, seconds=seconds, waits=sum(found.values()))
        for place, times in found.most_common(30):
            stage.add(place, times=times)
        if stage.device == "cuda":
            events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
            busy = sum(event.self_device_time_total for event in events) / 1e6
            stage.add("device", headline=True, busy_seconds=busy)
            for event in events[:20]:
                stage.add(event.key[:100], us=event.self_device_time_total, calls=event.count)


def make_inputs(folder: Path, *, small: bool) -> None:
    """Write a random Llama, a byte tokenizer's vocabulary beside it, and text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenkit.tokenization.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("byte")
    tokenizer.save(folder / "model")
    width, layers = (32, 1) if small else (2048, 16)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size if small else 128_256, hidden_size=width, num_hidden_layers=layers,
        intermediate_size=4 * width, num_attention_heads=max(width // 64, 1), max_position_embeddings=1024,
        num_key_value_heads=max(width // 256, 1), tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cpu" if small else "cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16 if not small else torch.float32).save_pretrained(
            folder / "model"
        )
    sentence = "The quick brown fox jumps over the lazy dog, and then it rests beside the river. "
    text = "\n\n".join(f"{number}. {sentence * 6}" for number in range(300))
    (folder / "text.txt").write_text(text, encoding="utf-8")
