"""What an ensemble costs beside its members: scoring and writing, against the sum of the members alone.

    OMP_NUM_THREADS=1 python bench/ensembles.py --save bench/results/cpu/ensembles.json

Two random Llamas over one vocabulary. `scoring` asks for log p of every token, `with members` also for that
of each member alone (bits per byte), `answers` for whether it is the likeliest too, as lm-eval does, and
`writing` for new tokens behind a prompt, greedily, with caches. The members do the same alone, one after the
other: their kernel says with each log p whether it is the likeliest. Times are those of the processor.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import print_table, save, time_interleaved
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.evaluation.ensemble import Ensemble, Member
from tokenkit.evaluation.scorer import ModelScorer
from tokenkit.models.causal_lm import CausalLM


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    arguments = parser.parse_args()
    members = [opened(arguments, seed) for seed in (0, 1)]
    results = measure(members, arguments)
    print_table(results)
    if arguments.save:
        save(arguments.save, "cpu", results)


def opened(arguments: argparse.Namespace, seed: int) -> Any:
    """Return a random model as an ensemble takes it."""
    torch.manual_seed(seed)
    D = arguments.hidden_size
    config = LlamaConfig(
        vocab_size=arguments.vocab_size, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    causal = CausalLM(LlamaForCausalLM(config), arguments.vocab_size).eval()
    tokenizer = SimpleNamespace(vocab_size=arguments.vocab_size, pad_token_id=0, eos_token_id=0)
    return SimpleNamespace(
        causal=causal, model=causal.causal_lm, tokenizer=tokenizer, hf_tokenizer=tokenizer,
        positions=1024, device=torch.device("cpu"),
    )  # fmt: skip


def measure(members: list[Any], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return milliseconds of members and ensembles, and their quotients."""
    B, T = arguments.rows, arguments.tokens
    ids_BT = torch.randint(arguments.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    at = torch.arange(B).repeat_interleave(T - 1), torch.arange(T - 1).repeat(B)
    target_N = ids_BT[at[0], at[1] + 1]
    prompts, new = [ids_BT[0, :32].tolist()], arguments.new_tokens
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    scorers = [ModelScorer(one) for one in members]
    kinds = {
        kind: Ensemble([Member(one) for one in members], kind) for kind in ("mean_prob", "mean_logits", "max")
    }

    def never(ids: Any) -> bool:
        return False

    def each(ask: Any) -> Any:
        return lambda: [ask(scorer) for scorer in scorers]

    asked: dict[str, dict[str, Any]] = {
        "scoring": {"members": each(lambda s: s.score(ids_BT, at, target_N))}
        | {
            k: lambda e=e: e.likelihoods(ids_BT, at, target_N, asks_top=False, asks_members=False)
            for k, e in kinds.items()
        }
        | {
            f"{k} with members": lambda e=e: e.likelihoods(ids_BT, at, target_N, asks_top=False)
            for k, e in kinds.items()
        },
        "answers": {"members": each(lambda s: s.score(ids_BT, at, target_N))}
        | {k: lambda e=e: e.score(ids_BT, at, target_N) for k, e in kinds.items()},
        "writing": {"members": each(lambda s: s.generate(prompts, never, options))}
        | {k: lambda e=e: e.generate(prompts, never, options) for k, e in kinds.items()},
    }
    found: dict[str, dict[str, float]] = {}
    for task, contenders in asked.items():
        timings = time_interleaved(contenders, arguments.repetitions, "cpu", processor_time=True)
        alone = timings["members"].median
        for name, timing in timings.items():
            found[f"{task}, {name}"] = {"ms": timing.median, "over_members": timing.median / alone}
    return found


if __name__ == "__main__":
    main()
