"""`tokenkit bits-per-byte`: what models with any tokenizers need for a byte of a text.

tokenkit bits-per-byte text.txt --models A B --stride 256 --output scores.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.forms import with_positions
from tokenkit.config.paths import check_model_folder
from tokenkit.errors import ConfigError, at_least, blaming_data
from tokenkit.models.options import Dtype

ALIASES = {"model": "models", "max_samples": "limit"}


@dataclass(frozen=True, kw_only=True)
class BitsPerByteConfig:
    """Compare models on a text, over the very same bytes."""

    text: str
    """File, folder or hub name of the documents (docs/data.md)."""

    models: tuple[str, ...]
    """Folders or hub names, each with its tokenizer; the first is what the others are compared with."""

    output: str | None = None
    """JSON file that is written beside the table; it must not exist."""

    max_length: int = 512
    """Tokens that a model reads at once; less where it has fewer positions."""

    stride: int | None = None
    """Tokens between the beginnings of two windows of a longer document. None: half a window."""

    limit: int | None = None
    """Documents that are read, at most."""

    bootstrap_samples: int = 1000
    """Draws of documents for the interval of a difference."""

    seed: int = 0
    """Of these draws."""

    dtype: Dtype = "float32"
    """Of the models."""

    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        at_least("max_length", self.max_length, 2)
        at_least("stride", self.stride, 1, self.max_length - 1)
        at_least("limit", self.limit, 1)
        at_least("bootstrap_samples", self.bootstrap_samples, 100)
        at_least("seed", self.seed, 0)
        if not self.models or len(set(self.models)) < len(self.models):
            raise ConfigError(f"models must name each model once, got {list(self.models)}")
        for name in self.models:
            check_model_folder("models", name)
        if self.output is not None and Path(self.output).expanduser().exists():
            raise FileExistsError(f"output {self.output} exists: give another name, or move the file away")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = with_positions(sys.argv[1:] if argv is None else argv, "text")

    def scored() -> None:
        score(parse_command_line(BitsPerByteConfig, words, program="tokenkit bits-per-byte", aliases=ALIASES))

    return run(scored)


def score(config: BitsPerByteConfig) -> None:
    """Score the text under each model, one after the other; print the table, write the file.

    Raises:
        DataError, FileNotFoundError: a text, a model or a tokenizer that cannot be read.
    """
    from tokenkit.data.mix import read_documents
    from tokenkit.data.options import SourceOptions
    from tokenkit.disk import write_durably
    from tokenkit.evaluation.text_bits import bits_of_bytes, summary, table
    from tokenkit.tokenization.tokenizer import load_tokenizer
    from tokenkit.tokenization.unwritable import writable_text

    remote = config.trust_remote_code
    with blaming_data():
        documents = read_documents(SourceOptions(path=config.text), config.limit)
        if any(document.text is None for document in documents):
            raise ValueError(f"text {config.text} holds conversations: give plain text")
        tokenizers = [load_tokenizer(name, trust_remote_code=remote) for name in config.models]
        texts = [writable_text(str(document.text), tokenizers)[0] for document in documents]
        texts = [text for text in texts if text]
        bits, tokens = {}, {}
        for name, tokenizer in zip(config.models, tokenizers, strict=True):
            model, window = _load(config, name, tokenizer)
            stride = min(config.stride or max(1, window // 2), window - 1)
            bits[name], tokens[name] = bits_of_bytes(model, tokenizer, texts, window=window, stride=stride)
        found = summary(texts, bits, tokens, samples=config.bootstrap_samples, seed=config.seed)
    print(table(found))
    if config.output is not None:
        write_durably(Path(config.output).expanduser(), json.dumps(found, indent=2) + "\n")


def _load(config: BitsPerByteConfig, name: str, tokenizer: Any) -> tuple[Any, int]:
    """Return a model, and how many tokens it reads at once."""
    from tokenkit.models.causal_lm import DTYPES, LoadOptions, load_causal_lm

    options = LoadOptions(dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)
    model = load_causal_lm(name, tokenizer.vocab_size, options).eval()
    positions = getattr(model.config, "max_position_embeddings", None) or config.max_length
    return model, min(config.max_length, positions)


if __name__ == "__main__":
    raise SystemExit(main())
