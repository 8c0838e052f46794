"""Real tokenizers, each loaded once for all tests of this folder."""

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import settings

from tests.conftest import tokenizer_folder
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer

settings.register_profile("tokenkit", deadline=None)  # machines that test are often busy
settings.load_profile("tokenkit")


@pytest.fixture(scope="session")
def load_real() -> Callable[[str], Tokenizer]:
    """Loads a spec by the name of its tokenizer, such as `gpt2:target=Qwen2`; skips where that is absent."""

    @cache
    def load(spec: str) -> Tokenizer:
        name, colon, options = spec.partition(":")
        return load_tokenizer(f"{tokenizer_folder(name)}{colon}{options}")

    return load
