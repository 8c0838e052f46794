"""Scoring for benchmarks: tokenkit's adapter for lm-eval against lm-eval's own class, on one model.

    OMP_NUM_THREADS=1 python bench/scoring.py --save bench/results/cpu/scoring.json

A Llama of two layers, width 64, over 151,936 ids; 8 requests of 512 tokens in one batch. `whole`: a text is
scored from its second token on; `choice`: the last 12 tokens are. Both get token ids, so tokenizers play no
part. Prints seconds of processor time, tokens per second, and the memory above model and requests, in one
process each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import machine, peak_bytes, print_table

BATCH, LENGTH, VOCABULARY = 8, 512, 151_936
SCORED = {"whole": LENGTH - 1, "choice": 12}


def main() -> None:
    """Measure each contender in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--one", nargs=2, help="a contender and a case: what the processes get")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.repetitions)))
        return
    rows: dict[str, dict[str, Any]] = {}
    for case in SCORED:
        for name in ("tokenkit", "HFLM"):
            words = ["--one", name, case, "--repetitions", str(arguments.repetitions)]
            done = subprocess.run(
                [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
            )
            rows[f"{case}, {name}"] = json.loads(done.stdout.splitlines()[-1])
        answers = [rows[f"{case}, {name}"].pop("answers") for name in ("tokenkit", "HFLM")]
        furthest = max(abs(a - b) / abs(b) for a, b in zip(*answers, strict=True))
        rows[f"{case}, tokenkit"]["apart"] = furthest
    print_table(rows)
    if arguments.save:
        facts = machine("cpu") | {"lm_eval": __import__("importlib.metadata").metadata.version("lm_eval")}
        arguments.save.write_text(json.dumps({"machine": facts, "results": rows}, indent=1) + "\n")


def measure(name: str, case: str, repetitions: int) -> dict[str, Any]:
    """Return seconds, tokens per second, MiB and answers of one contender."""
    lm = (ours if name == "tokenkit" else stock)(model())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, VOCABULARY, (BATCH, LENGTH), generator=generator).tolist()
    pairs = [(None, row[: -SCORED[case]], row[-SCORED[case] :]) for row in ids]

    def step() -> Any:
        return lm._loglikelihood_tokens(pairs, disable_tqdm=True)

    peak = peak_bytes(step, "cpu")
    seconds = []
    for _ in range(repetitions):
        began = time.process_time()
        answers = step()
        seconds.append(time.process_time() - began)
    best = sorted(seconds)[len(seconds) // 2]
    return {
        "seconds": round(best, 2), "tokens/s": round(BATCH * LENGTH / best),
        "MiB": peak >> 20, "answers": [logp for logp, _ in answers],
    }  # fmt: skip


def model() -> Any:
    """Return the model, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes)
    return LlamaForCausalLM(config).eval()


def tokenizer() -> Any:
    """Return any tokenizer of transformers."""
    from tokenkit.tokenization.tokenizer import load_tokenizer

    return load_tokenizer("byte").to_huggingface()


def ours(loaded: Any) -> Any:
    """Return the adapter."""
    from tokenkit.evaluation.lm_eval import Asking, language_model
    from tokenkit.evaluation.scorer import ModelScorer
    from tokenkit.models.causal_lm import CausalLM
    from tokenkit.parallel import World

    own = tokenizer()
    device = torch.device("cpu")
    opened: Any = SimpleNamespace(
        causal=CausalLM(loaded, VOCABULARY), model=loaded, hf_tokenizer=own, positions=LENGTH, device=device
    )
    return language_model(ModelScorer(opened), own, Asking(batch_size=BATCH), World(0, 1, device, None))


def stock(loaded: Any) -> Any:
    """Return lm-eval's class."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=loaded, tokenizer=tokenizer(), batch_size=BATCH)


if __name__ == "__main__":
    main()
