"""What an exported tokenizer must know to make batches for its model."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenkit.tokenization.tokenizer import Tokenizer

PADDING = re.compile(r"(?i)^[<\[|\s]*(?:finetune_right_|finetune_|right_)?pad(?:ding)?(?:_?id)?[>\]|\s]*$")
"""Special tokens that say they are padding: `<pad>`, `[PAD]`, `<|finetune_right_pad_id|>`, ..."""


def padding_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that pads batches: the tokenizer's own, else a special token of that name, else EOS.

    Padding is masked, so the choice moves no number; but without one no batch can be made.
    """
    if tokenizer.pad_id is not None:
        return tokenizer.pad_id
    named = sorted(i for string, i in tokenizer.control.items() if PADDING.match(string))
    return named[0] if named else tokenizer.eos_id


def fill_tokenizer_config(folder: Path, tokenizer: Tokenizer) -> None:
    """Say in tokenizer_config.json what depends on the model, or on use: positions, padding and its side."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    beside = folder / "config.json"
    model = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    positions = (model.get("text_config") or model).get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        config["model_max_length"] = positions
    pad_id = padding_id(tokenizer)
    strings = {token_id: string for string, token_id in tokenizer.control.items()}
    if pad_id in strings:
        config["pad_token"] = strings[pad_id]
        config["padding_side"] = "left"  # generation goes on at the right
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
