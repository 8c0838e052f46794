"""What every test shares. The interpreter's variable must be set before triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.process_state import restored_process

settings.register_profile("busy", deadline=None)  # machines are shared: time says nothing about the code
settings.load_profile("busy")

OWN_DATA = Path(__file__).parent / "data"  # of the repository; tests/data/README.md says what is there
VECTORS = OWN_DATA / "vectors" / "losses.npz"
LONGEST = {
    "test_aot.py",
    "test_docs.py",
    "test_expansion.py",
    "test_kill.py",
    "test_parity.py",
    "test_ranks_agree.py",
    "test_real_pairs.py",
    "test_resume.py",
    "test_unigram.py",
}
SHARED_DATA = Path(os.environ.get("TOKENKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def tokenizer_folder(name: str) -> Path:
    """Return the folder of a tokenizer: of the repository or of the data beside it; skip where absent."""
    for root in (OWN_DATA, SHARED_DATA):
        if (root / "tokenizers" / name).is_dir():
            return root / "tokenizers" / name
    pytest.skip(f"the tokenizer {name} is absent: set TOKENKIT_DATA ({SHARED_DATA} does not hold it)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: at the end, one worker would wait for the other's."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    with restored_process():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, models and text; tests that need them skip where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is absent: set TOKENKIT_DATA ({SHARED_DATA} does not exist)")
    return SHARED_DATA
