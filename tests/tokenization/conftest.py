"""The small tokenizers, built once."""

from pathlib import Path

import pytest

from tests.tokenization.tiny import KINDS
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: build(root / kind.replace(" ", "-")) for kind, build in KINDS.items()}


@pytest.fixture(scope="session")
def tokenizers(folders) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}
