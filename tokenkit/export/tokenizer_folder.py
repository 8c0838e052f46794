"""The tokenizer of an exported folder: written, and compared with what `AutoTokenizer` reads back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenkit.errors import ExportError
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.written import writable_text

PLAIN_TOKENIZER = '''"""The tokenizer of tokenizer.json, as it is."""

from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    """Reads tokenizer.json; adds nothing."""
'''
SAMPLE = "The quick brown fox, naïve in 1984 —\n\tjumps: 東京 🙂 over it."
OTHER_SAMPLES = (
    "  two leading,\n\n\nthree   in between, trailing  ",
    "def f(x):\n    return x + 12345  # don't\r\n",
    "Привет, мир! नमस्ते العربية e\u0301 \u00a0\u2028",
)
MAX_WORDS = 50  # added tokens that are text, looked for one by one
PADDING = re.compile(r"(?i)^[<\[|\s]*(?:finetune_right_|finetune_|right_)?pad(?:ding)?(?:_?id)?[>\]|\s]*$")
"""Special tokens that say they are padding: `<pad>`, `[PAD]`, `<|finetune_right_pad_id|>`, ..."""


def sample_ids(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the ids of a text in several scripts."""
    return tokenizer.encode(_writable(SAMPLE, tokenizer)).ids


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, has_own_class: bool) -> None:
    """Write the tokenizer beside a model's config.json, so that `AutoTokenizer` reads it as it is.

    For some model types (qwen2, phi3) transformers 5 ignores the class that tokenizer_config.json names
    and puts the new vocabulary behind the old architecture's pre-tokenizer, or adds its pad token: other ids,
    no warning. A class of the folder's own takes precedence, and where its code is not trusted the file is
    read as it is.

    Where the model has a class of its own, AutoTokenizer must trust its code: it asks the model's
    configuration for the model type first.

    Raises:
        ExportError: the tokenizer, loaded back, reads otherwise all the same.
    """
    tokenizer.save(folder)
    _fill_config(folder, tokenizer)
    if _difference_of_reload(folder, tokenizer, trusts_code=has_own_class) is None:
        return
    (folder / "tokenization_plain.py").write_text(PLAIN_TOKENIZER, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_plain.PlainTokenizer"]}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (difference := _difference_of_reload(folder, tokenizer, trusts_code=has_own_class)) is not None:
        raise ExportError(f"{folder}: the tokenizer, loaded back, {difference}")


def _difference_of_reload(folder: Path, tokenizer: Tokenizer, *, trusts_code: bool) -> str | None:
    """Return in what the tokenizer differs that `AutoTokenizer` makes of the folder."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code)
    for text in _samples(tokenizer):
        got = list(loaded(text, add_special_tokens=False)["input_ids"])
        ids = tokenizer.encode(text).ids.tolist()
        if got != ids:
            return f"gives {got} instead of {ids} for {text!r}"
    for role in ("bos", "eos", "pad"):
        own = padding_id(tokenizer) if role == "pad" else getattr(tokenizer, f"{role}_id")
        theirs = getattr(loaded, f"{role}_token_id")
        if theirs != own:
            return f"has {theirs} as {role}_token_id instead of {own}"
    if len(loaded) > tokenizer.vocab_size:
        return f"has {len(loaded)} tokens instead of {tokenizer.vocab_size}"
    return None


def _samples(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield canonical texts without a special token in them, one around each of the added words."""
    added = sorted(tokenizer.vocabulary.text_added)[:MAX_WORDS]
    words = [tokenizer.token_bytes[token_id].decode("utf-8", "ignore") for token_id in added]
    around = [f"a {word}b{word} {word}" for word in words]
    for text in (SAMPLE, *OTHER_SAMPLES, *around):
        canonical = _writable(text, tokenizer)
        if canonical and not any(string in canonical for string in tokenizer.control):
            yield canonical


def _writable(text: str, tokenizer: Tokenizer) -> str:
    return writable_text(text, [tokenizer])[0]


def padding_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that pads batches: the tokenizer's own, else a special token of that name, else EOS.

    Padding is masked, so the choice moves no number; but without one no batch can be made.
    """
    if tokenizer.pad_id is not None:
        return tokenizer.pad_id
    named = sorted(i for string, i in tokenizer.control.items() if PADDING.match(string))
    return named[0] if named else tokenizer.eos_id


def _fill_config(folder: Path, tokenizer: Tokenizer) -> None:
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
