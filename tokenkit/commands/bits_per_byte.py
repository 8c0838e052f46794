"""`tokenkit bits-per-byte`: what models with any tokenizers need for a byte of a text.

tokenkit bits-per-byte text.txt --models A B --stride 256 --output scores.json --plot scores.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.forms import with_positions
from tokenkit.config.paths import check_opened
from tokenkit.errors import ConfigError, at_least, blaming_data, names_a_new_file
from tokenkit.models.options import Dtype

if TYPE_CHECKING:
    from tokenkit.evaluation.opened import Opened

ALIASES = {"model": "models", "max_samples": "limit"}


@dataclass(frozen=True, kw_only=True)
class BitsPerByteConfig:
    """Compare models on a text, over the very same bytes."""

    text: str
    """File, folder or hub name of the documents (docs/data.md)."""

    models: tuple[str, ...]
    """Folders of models, runs or checkpoints, or hub names, each with its tokenizer; the first is what the
    others are compared with."""

    output: str | None = None
    """JSON file that is written beside the table; it must not exist."""

    plot: str | None = None
    """PNG of the figures by class; it must not exist."""

    max_length: int = 512
    """Tokens that a model reads at once; less where it has fewer positions."""

    stride: int | None = None
    """Tokens between the beginnings of two windows of a longer document. None: half a window."""

    batch_size: int = 8
    """Windows that are read together: no figure changes, only time and memory."""

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
        at_least("batch_size", self.batch_size, 1)
        at_least("limit", self.limit, 1)
        at_least("bootstrap_samples", self.bootstrap_samples, 100)
        at_least("seed", self.seed, 0)
        if not self.models or len(set(self.models)) < len(self.models):
            raise ConfigError(f"models must name each model once, got {list(self.models)}")
        for flag in ("output", "plot"):
            names_a_new_file(flag, getattr(self, flag))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = with_positions(sys.argv[1:] if argv is None else argv, "text")

    def scored() -> None:
        score(parse_command_line(BitsPerByteConfig, words, program="tokenkit bits-per-byte", aliases=ALIASES))

    return run(scored)


def score(config: BitsPerByteConfig) -> None:
    """Score the text under each model, one after the other; print the table, write the files.

    Raises:
        DataError, FileNotFoundError: a text, a model or a tokenizer that cannot be read.
    """
    check_opened("models", *config.models)
    from tokenkit.disk import write_durably
    from tokenkit.evaluation.text_bits import bits_of_bytes, nats_of, summary, table
    from tokenkit.tokenization.written import writable_text

    with ExitStack() as held:
        opened = {name: _Member(config, name, held) for name in config.models}
        tokenizers = [member.tokenizer for member in opened.values()]
        with blaming_data():
            texts = [writable_text(text, tokenizers)[0] for text in read_texts(config.text, config.limit)]
        texts = [text for text in texts if text]
        bits, tokens = {}, {}
        for name, member in opened.items():
            with member.model() as model:
                window = min(config.max_length, model.positions or config.max_length)
                stride = min(config.stride or max(1, window // 2), window - 1)
                bits[name], tokens[name] = bits_of_bytes(
                    nats_of(model.causal), model.tokenizer, texts,
                    window=window, stride=stride, batch=config.batch_size,
                )  # fmt: skip
        with blaming_data():
            found = summary(texts, bits, tokens, samples=config.bootstrap_samples, seed=config.seed)
    print(table(found))
    if config.output is not None:
        write_durably(Path(config.output).expanduser(), json.dumps(found, indent=2) + "\n")
    if config.plot is not None:
        write_durably(Path(config.plot).expanduser(), _picture(found))


def read_texts(name: str, limit: int | None) -> list[str]:
    """Return the documents of a file, folder or hub name.

    Raises:
        ValueError: it holds conversations.
    """
    from tokenkit.data.mix import read_documents
    from tokenkit.data.options import SourceOptions

    documents = read_documents(SourceOptions(path=name), limit)
    if any(document.text is None for document in documents):
        raise ValueError(f"text {name} holds conversations: give plain text")
    return [str(document.text) for document in documents]


class _Member:
    """A model that is loaded when its turn comes; its tokenizer is there before."""

    def __init__(self, config: BitsPerByteConfig, name: str, held: ExitStack):
        from tokenkit.evaluation.opened import finished_export, is_training, open_model
        from tokenkit.models.causal_lm import DTYPES
        from tokenkit.tokenization.tokenizer import load_tokenizer

        trust, path = config.trust_remote_code, str(Path(name).expanduser())
        self._open = partial(open_model, name, dtype=DTYPES[config.dtype], trust_remote_code=trust)
        self._opened: Opened | None = None
        folder = finished_export(path)
        if folder is None and is_training(path):  # only its export has the tokenizer
            self._opened = held.enter_context(self._open())
            self.tokenizer = self._opened.tokenizer
        else:
            with blaming_data():
                self.tokenizer = load_tokenizer(str(folder or name), trust_remote_code=trust)

    def model(self) -> AbstractContextManager[Opened]:
        """Return the model, for the time of a `with`."""
        return self._open() if self._opened is None else nullcontext(self._opened)


def _picture(found: dict[str, Any]) -> bytes:
    from tokenkit.evaluation.bars import draw_bars

    kinds = list(found["share_of_bytes_by_class"])
    heights = {
        name: [one["bits_per_byte"], *(one["bits_per_byte_by_class"][kind] for kind in kinds)]
        for name, one in found["models"].items()
    }
    return draw_bars(["all", *kinds], heights, "bits per byte (lower is better)")


if __name__ == "__main__":
    raise SystemExit(main())
