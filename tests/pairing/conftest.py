"""Real tokenizers, each loaded once for all tests of this folder."""

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import settings

from tokenkit.tokenization.byteify import Tokenizer, load_tokenizer

settings.register_profile("tokenkit", deadline=None)  # machines that test are often busy
settings.load_profile("tokenkit")


@pytest.fixture(scope="session")
def load_real(shared_data) -> Callable[[str], Tokenizer]:
    """Loads a spec whose name is a folder below the real data, such as `tokenizers/gpt2:target=Qwen2`."""

    @cache
    def load(spec: str) -> Tokenizer:
        return load_tokenizer(f"{shared_data}/{spec}")

    return load
