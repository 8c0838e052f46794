"""What initialisations of a new vocabulary are worth: bits per byte on a text, before any training.

The old model, under its own tokenizer, is measured over the very same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenkit.data.collate import AlignedCollator
from tokenkit.evaluation.bars import draw_bars
from tokenkit.evaluation.bits_per_byte import bits_per_byte, heldout_batches
from tokenkit.models.causal_lm import effective_weight
from tokenkit.parallel import World
from tokenkit.training.distillation import Distillation

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM
    from tokenkit.tokenization.chat.documents import Document
    from tokenkit.tokenization.tokenizer import Tokenizer


def compare_methods(
    model: CausalLM,
    tokenizers: tuple[Tokenizer, Tokenizer],
    documents: Sequence[Document],
    max_length: int,
    transfers: Mapping[str, Callable[[str], dict[str, int]]],
) -> dict[str, Any]:
    """Score transfers of one model, each from its own old vocabulary. The model ends with the old one.

    Args:
        model: with its old vocabulary.
        tokenizers: the model's and the target.
        documents: the text that is scored.
        max_length: tokens of a document, at most; no more than the model has positions.
        transfers: by name of the method: moves `model` in place and returns its counts of rows.

    Returns:
        `original` in bits per byte, `num_bytes`, and by method `bits_per_byte`, `seconds` of the transfer and
        `rows` by what they were made of.

    Raises:
        ValueError: no byte of the documents is scored under both vocabularies, or a transfer's own.
    """
    old, new = tokenizers
    limit = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    collator = AlignedCollator(new, old, max_length_student=limit, max_length_teacher=limit)
    batches = heldout_batches(documents, collator)
    original = model.vocabulary()
    pair = Distillation(model, original, {})
    world = World(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    result: dict[str, Any] = {"methods": {}}
    is_tied = model.is_tied
    for name, transfer in transfers.items():
        began = time.perf_counter()
        rows = transfer(name)
        seconds = time.perf_counter() - began
        measured = bits_per_byte(pair, batches, world)
        result |= {"original": measured.teacher, "num_bytes": measured.num_bytes}
        result["methods"][name] = {
            "bits_per_byte": measured.student,
            "seconds": round(seconds, 3),
            "rows": rows,
        }
        restored = original.head()
        model.replace_vocabulary(
            embedding_VD=effective_weight(original.embedding).detach(),
            output_VD=None if is_tied else restored.weight_VD.detach(),
            bias_V=None if restored.bias_V is None else restored.bias_V.detach(),
            vocab_size=old.vocab_size,
            table_VE=None if original.table is None else effective_weight(original.table.embedding).detach(),
        )
    return result


def table(result: Mapping[str, Any]) -> str:
    """Return the scores as text, best first."""
    lines = [f"{'method':<16} bits per byte   seconds"]
    lines += [f"{'(original)':<16} {result['original']:13.3f}"]
    for name, score in sorted(result["methods"].items(), key=lambda item: item[1]["bits_per_byte"]):
        lines.append(f"{name:<16} {score['bits_per_byte']:13.3f} {score['seconds']:9.2f}")
    return "\n".join([*lines, f"over {result['num_bytes']} bytes that both vocabularies score"])


def write_comparison(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `compare.json` and `compare.png` into a folder that is empty or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    scores = sorted((score["bits_per_byte"], name) for name, score in result["methods"].items())
    heights = {"bits per byte": [score for score, _ in scores]}
    line = f"original {result['original']:.2f}", result["original"]
    picture = draw_bars([name for _, name in scores], heights, "bits per byte (lower is better)", line)
    (folder / "compare.png").write_bytes(picture)
