"""Fast vocabulary transfer between real vocabularies: finding the sources, and making the rows.

    pytest bench/embeddings.py --benchmark-only

Real tokenizers come from the folder that the variable `TOKENKIT_DATA` names. Loading them is not counted.
"""

import os
from pathlib import Path

import pytest
import torch

from tokenkit.embeddings.rows import row_sources
from tokenkit.tokenization.tokenizer import load_tokenizer

DATA = Path(os.environ.get("TOKENKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS = [("llama3", "qwen2.5"), ("llama2", "gpt2"), ("t5-small", "llama3")]

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data is absent: {DATA}")


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=["llama3-qwen2.5", "llama2-gpt2", "t5-llama3"])
def test_sources_of_every_row(benchmark, old, new):
    tokenizers = [load_tokenizer(str(DATA / "tokenizers" / name)) for name in (old, new)]
    sources = benchmark.pedantic(row_sources, tokenizers, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(sources.report(), old=tokenizers[0].vocab_size, new=tokenizers[1].vocab_size)


def test_rows_of_a_large_embedding(benchmark):
    """128k to 152k rows of 1024 float32 numbers."""
    old, new = (load_tokenizer(str(DATA / "tokenizers" / name)) for name in ("llama3", "qwen2.5"))
    sources = row_sources(old, new)
    old_WD = torch.randn(old.vocab_size, 1024)
    benchmark.pedantic(sources.rows, (old_WD, new.vocab_size), rounds=3, warmup_rounds=1)
