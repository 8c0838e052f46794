"""Tiny models and tokenizers that tests make for themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "The cats sat on the mat, and the dog ran after the cats.",
    "Once upon a time there was a little girl who liked to read books about cats and dogs.",
    "naïve café — 東京 🙂 and 1984 was a year",
    "def align(student, teacher):\n    return student == teacher\n",
    "She said: 'I do not know.' Then she ran home to her mother and her little dog.",
] * 4

BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "qwen2": BASE,
    "qwen3": {**BASE, "head_dim": 8},
    "gemma2": {**BASE, "head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 16},
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mistral": BASE,
    "phi3": {**BASE, "pad_token_id": 0},
}


def tiny_model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """Return a randomly initialised Hugging Face model of about 30k parameters."""
    from transformers import AutoConfig

    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the default initialisation gives a nearly uniform model
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def byte_level_bpe(folder: Path, vocab_size: int = 300, *, bos: str = "<s>", eos: str = "</s>") -> Path:
    """Train a byte-level BPE tokenizer on TEXT and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[bos, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _save(folder, tokenizer, bos, eos)


def sentencepiece_bpe(folder: Path, vocab_size: int = 400) -> Path:
    """Train a BPE tokenizer in SentencePiece's form: `▁` for spaces, byte fallback, a dummy prefix."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    ascii_text = [line for line in TEXT if line.isascii()]
    tokenizer.train_from_iterator([word for line in ascii_text for word in line.split()], trainer)
    import json

    raw = json.loads(tokenizer.to_str())  # the byte pieces are ordinary pieces, not added tokens
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in fallback]
    return _save(folder, Tokenizer.from_str(json.dumps(raw)), "<s>", "</s>", unk_token="<unk>")


def is_written(tokenizer: Any) -> list[bool]:
    """Return which tokens may stand in a text; those made here have a letter behind the byte piece of it."""
    raws = tokenizer.token_bytes
    return [
        not special and raw not in raws[i + 1 :]
        for i, (raw, special) in enumerate(zip(raws, tokenizer.is_special_V, strict=True))
    ]


def _save(folder: Path, tokenizer: Tokenizer, bos: str, eos: str, **more: str) -> Path:
    bos_id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **more)
    wrapped.save_pretrained(folder)
    return folder


def tiny_folder(folder: Path, architecture: str = "llama", *, vocab_size: int = 300, **changes: Any) -> Path:
    """Save a tiny model together with a byte-level BPE tokenizer of `vocab_size` ids."""
    byte_level_bpe(folder, vocab_size)
    tiny_model(architecture, vocab_size=vocab_size, **changes).save_pretrained(folder)
    return folder
