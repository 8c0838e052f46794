"""Small tokenizers of every kind, trained in a moment on a page of text, written as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The cat sat on the mat, and the dog ran away from the cat. It's 12:30 now, isn't it?",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 22))\n",
    "Der Hund läuft über die Straße; naïve café, señor. Привет, мир! 日本語のテキスト。",
    "She said that they had been there before, and that the other one was not the same thing at all.",
] * 20
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCEPIECE_SPECIALS = ["<unk>", "<s>", "</s>"]


def write(folder: Path, document: dict[str, Any], **config: Any) -> Path:
    """Write the files of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_level(folder: Path) -> Path:
    """Byte-level BPE with NFC and runs of spaces as added tokens (like Pythia), and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (8, 4, 2)])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    document = json.loads(tokenizer.to_str())
    return write(folder, document, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)


def lacking_bytes(folder: Path) -> Path:
    """`byte_level` without the bytes of most characters beyond Latin."""
    document = json.loads((byte_level(folder) / "tokenizer.json").read_text())
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    gone = {name for name in vocab if set(name) & set("ðæï?")}
    document["model"]["vocab"] = {name: i for name, i in vocab.items() if name not in gone}
    document["model"]["merges"] = [m for m in merges if not gone & {*m, "".join(m)}]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def sentencepiece_bpe(folder: Path) -> Path:
    """SentencePiece BPE with dummy prefix and byte fallback (like Llama 2)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no piece crosses a space, as in SentencePiece
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=SENTENCEPIECE_SPECIALS + pieces,
        limit_alphabet=70,
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    document = json.loads(tokenizer.to_str())
    document["pre_tokenizer"] = None
    document["added_tokens"] = document["added_tokens"][:3]  # the byte pieces are pieces, not added tokens
    return write(folder, document, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(folder: Path, *, byte_fallback: bool = False) -> Path:
    """Unigram that splits at whitespace and drops it (like T5), with or without byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    ascii_only = [text for text in CORPUS if text.isascii()]
    tokenizer.train_from_iterator(ascii_only, trainer)
    document = json.loads(tokenizer.to_str())
    if byte_fallback:
        document["model"]["vocab"] += [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
        document["model"]["byte_fallback"] = True
    return write(folder, document, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def metaspace(folder: Path) -> Path:
    """SentencePiece as a pre-tokenizer, prefix at the very start only, and no bytes to fall back on."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=SENTENCEPIECE_SPECIALS, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return write(
        folder, json.loads(tokenizer.to_str()), bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece_bpe,
    "unigram": unigram,
    "unigram with bytes": lambda folder: unigram(folder, byte_fallback=True),
    "metaspace": metaspace,
}
