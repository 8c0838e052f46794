"""Alignment and collation against tokenizing the same documents.

    pytest bench/align.py --benchmark-only

Real tokenizers and text come from `TOKENKIT_DATA` (default `../shared/data`). Times are CPU seconds of the
process, all its threads: others on the machine do not count. Ratios are taken between the fastest of
interleaved runs: the machine's mood cancels out. Tokenizing alone is the tokenizers library as it comes.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when the library first encodes

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from tokenkit.data.collate import AlignedCollator
from tokenkit.pairing.align import align_batch
from tokenkit.structs import Tokens
from tokenkit.tokenization.byteify import Tokenizer, load_tokenizer

DATA = Path(os.environ.get("TOKENKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS = [("llama3", "qwen2.5"), ("llama2", "gpt2")]
DOCUMENTS = 64
WORDS = 400
REPEATS = 25

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data is absent: {DATA}")


@pytest.fixture(scope="module")
def stories() -> list[str]:
    """Texts of 400 words, about the 512 tokens of a training row."""
    words = (
        (DATA / "text/tinystories.train.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "").split()
    )
    return [" ".join(words[at : at + WORDS]) for at in range(0, DOCUMENTS * WORDS, WORDS)]


@pytest.fixture(scope="module", params=PAIRS, ids="/".join)
def names(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def pair(names: tuple[str, str]) -> tuple[Tokenizer, Tokenizer]:
    student, teacher = (load_tokenizer(str(DATA / "tokenizers" / name)) for name in names)
    return student, teacher


@pytest.fixture(scope="module")
def bare(names: tuple[str, str], stories: list[str]) -> Callable[[], object]:
    """Tokenizing alone: the tokenizers library as it comes, both sides, ids out."""
    folders = [DATA / "tokenizers" / name / "tokenizer.json" for name in names]
    backends = [tokenizers.Tokenizer.from_file(str(folder)) for folder in folders]

    def tokenize() -> object:
        return [
            [encoding.ids for encoding in backend.encode_batch_fast(stories, add_special_tokens=False)]
            for backend in backends
        ]

    return tokenize


def fastest(*functions: Callable[[], object]) -> list[float]:
    """Return the least CPU time of each function in seconds, their runs interleaved."""
    best = [float("inf")] * len(functions)
    for _ in range(REPEATS):
        for index, function in enumerate(functions):
            start = time.process_time()
            function()
            best[index] = min(best[index], time.process_time() - start)
    return best


def encode_sides(pair: tuple[Tokenizer, Tokenizer], stories: list[str]) -> list[list[Tokens]]:
    return [tokenizer.encode_batch(stories) for tokenizer in pair]


def test_alignment_is_faster_than_4_million_tokens_per_second(benchmark, pair, stories):
    student, teacher = encode_sides(pair, stories)
    count = sum(len(tokens.ids) for tokens in student + teacher)
    benchmark(align_batch, student, teacher)
    rate = count / benchmark.stats.stats.min
    benchmark.extra_info.update(tokens=count, million_tokens_per_second=round(rate / 1e6, 1))
    assert rate >= 4e6


def test_alignment_takes_less_than_a_twentieth_of_tokenizing(benchmark, pair, bare, stories):
    student, teacher = encode_sides(pair, stories)
    alone, aligned = benchmark.pedantic(
        fastest, args=(bare, lambda: align_batch(student, teacher)), rounds=1, iterations=1
    )
    benchmark.extra_info.update(share_of_tokenizing=round(aligned / alone, 4))
    assert aligned / alone < 0.05


def test_collation_takes_at_most_a_fifth_more_than_tokenizing(benchmark, pair, bare, stories):
    collator = AlignedCollator(*pair)
    rows = [{"text": story} for story in stories]
    alone, verified, collated = benchmark.pedantic(
        fastest,
        args=(bare, lambda: encode_sides(pair, stories), lambda: collator(rows)),
        rounds=1,
        iterations=1,
    )
    benchmark.extra_info.update(
        milliseconds_tokenizing=round(alone * 1e3, 2),
        ratio_with_byte_check=round(verified / alone, 3),
        ratio_collated=round(collated / alone, 3),
    )
    assert collated / alone <= 1.2
