"""Loading a tokenizer, and encoding with byte ends against the tokenizers library alone.

    pytest bench/tokenization.py --benchmark-only

Real tokenizers and text come from the folder that the variable `TOKENKIT_DATA` names. Ratios are taken
between the fastest of interleaved runs in one process: the machine's mood cancels out.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from tokenkit.tokenization.chat.encode import Document, encode_documents
from tokenkit.tokenization.tokenizer import canonical_text, load_tokenizer
from tokenkit.tokenization.vocabulary import read_vocabulary

DATA = Path(os.environ.get("TOKENKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
NAMES = ["gpt2", "llama2", "llama3", "qwen2.5", "t5-small"]
DOCUMENTS = 200
REPEATS = 15

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data is absent: {DATA}")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """WikiText as its tokenizers leave it: one line of words, about 500 tokens."""
    text = (DATA / "text/wikitext2.valid.txt").read_text(encoding="utf-8")
    words = text.replace("<unk>", "unknown").split()
    return [" ".join(words[at : at + 400]) for at in range(0, 400 * DOCUMENTS, 400)]


def fastest(*functions: Callable[[], object]) -> list[float]:
    """Return the shortest time of each function in seconds, their runs interleaved."""
    best = [float("inf")] * len(functions)
    for _ in range(REPEATS):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


@pytest.mark.parametrize("name", ["qwen2.5", "bpe-minipile-262k", "tiktoken-o200k_base"])
def test_byteifying_a_vocabulary_takes_less_than_two_seconds(benchmark, name):
    document = json.loads((DATA / "tokenizers" / name / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = benchmark.pedantic(read_vocabulary, (document,), rounds=5, warmup_rounds=1)
    benchmark.extra_info["ids"] = len(vocabulary.token_bytes)
    assert benchmark.stats.stats.min < 2


@pytest.mark.parametrize("name", ["qwen2.5", "tiktoken-o200k_base"])
def test_loading_a_tokenizer(benchmark, name):
    """Against the library's own reading of the file, which is most of it."""
    folder = DATA / "tokenizers" / name
    start = time.perf_counter()
    tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    benchmark.extra_info["library_seconds"] = round(time.perf_counter() - start, 3)
    benchmark.pedantic(load_tokenizer, (str(folder),), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("name", NAMES)
def test_byte_ends_cost_little_beside_tokenizing(benchmark, texts, name):
    tokenizer = load_tokenizer(str(DATA / "tokenizers" / name))
    library = tokenizers.Tokenizer.from_file(str(DATA / "tokenizers" / name / "tokenizer.json"))

    def bare() -> object:
        return [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]

    texts = [canonical_text(text, tokenizer) for text in texts]
    documents = [Document(text=text) for text in texts]
    count = sum(len(tokens.ids) for tokens in tokenizer.encode_batch(texts))
    bare_s, encode_s, documents_s = fastest(
        bare,
        lambda: tokenizer.encode_batch(texts),
        lambda: encode_documents(documents, [tokenizer], mode="direct_encode"),
    )
    benchmark.extra_info["million_tokens_per_second"] = round(count / encode_s / 1e6, 2)
    benchmark.extra_info["times_the_library"] = round(encode_s / bare_s, 3)
    benchmark.extra_info["documents_times_the_library"] = round(documents_s / bare_s, 3)
    benchmark.pedantic(tokenizer.encode_batch, (texts,), rounds=3)
    if tokenizer.unk_id is None:
        assert documents_s / bare_s < 1.4
