"""Alignment and collation against tokenizing the same documents.

    pytest bench/align.py --benchmark-only
    python bench/align.py llama3 qwen2.5 stories 2   # one case: student, teacher, rows, tokenizer threads

Real tokenizers and text come from the folder that the variable `TOKENKIT_DATA` names. Ratios are taken
between the fastest of interleaved runs in one process: the machine's mood cancels out. Times are CPU seconds
of all threads, so that others on the machine do not count; with more than one tokenizer thread, where that
would hide what waits for Python, they are wall time and want a quiet machine. Tokenizing alone is the
tokenizers library as it comes, both sides, ids out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from tokenkit.data.collate import AlignedCollator
from tokenkit.pairing.align import align_batch
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer

DATA = Path(os.environ.get("TOKENKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS = [("llama3", "qwen2.5"), ("llama2", "gpt2")]
DOCUMENTS = 64
WORDS = 400
REPEATS = 40

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data is absent: {DATA}")


def read_rows(kind: str) -> list[str]:
    """Return 64 texts: `stories` as they are, about 180 tokens, or `long` ones of 400 words, about 500."""
    text = (DATA / "text/tinystories.train.txt").read_text(encoding="utf-8")
    if kind == "stories":
        return [story for story in map(str.strip, text.split("<|endoftext|>")) if story][:DOCUMENTS]
    words = text.replace("<|endoftext|>", "").split()
    return [" ".join(words[at : at + WORDS]) for at in range(0, DOCUMENTS * WORDS, WORDS)]


def load_pair(names: tuple[str, str]) -> tuple[Tokenizer, Tokenizer]:
    student, teacher = (load_tokenizer(str(DATA / "tokenizers" / name)) for name in names)
    return student, teacher


def tokenizing_alone(names: tuple[str, str], texts: list[str]) -> Callable[[], object]:
    """Return what collation is measured against."""
    files = [DATA / "tokenizers" / name / "tokenizer.json" for name in names]
    backends = [tokenizers.Tokenizer.from_file(str(file)) for file in files]

    def tokenize() -> object:
        return [
            [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
            for backend in backends
        ]

    return tokenize


def fastest(clock: Callable[[], float], *functions: Callable[[], object]) -> list[float]:
    """Return the least time of each function in seconds, their runs interleaved."""
    best = [float("inf")] * len(functions)
    for _ in range(REPEATS):
        for index, function in enumerate(functions):
            start = clock()
            function()
            best[index] = min(best[index], clock() - start)
    return best


def measure_collation(names: tuple[str, str], kind: str, threads: int) -> dict[str, float]:
    """Return milliseconds of tokenizing alone and the ratio of collation, in this process."""
    texts = read_rows(kind)
    collator, rows = AlignedCollator(*load_pair(names)), [{"text": text} for text in texts]
    alone = tokenizing_alone(names, texts)
    # two contenders, not more: each finds the caches as the other left them
    clock = time.process_time if threads == 1 else time.perf_counter
    alone_s, collated_s = fastest(clock, alone, lambda: collator(rows))
    return {"milliseconds_tokenizing": round(alone_s * 1e3, 2), "ratio": round(collated_s / alone_s, 3)}


@pytest.fixture(scope="module", params=PAIRS, ids="/".join)
def names(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def test_alignment_is_faster_than_4_million_tokens_per_second(benchmark, names):
    student, teacher = (tokenizer.encode_batch(read_rows("long")) for tokenizer in load_pair(names))
    count = sum(len(tokens.ids) for tokens in student + teacher)
    benchmark(align_batch, student, teacher)
    rate = count / benchmark.stats.stats.min
    benchmark.extra_info.update(tokens=count, million_tokens_per_second=round(rate / 1e6, 1))
    assert rate >= 4e6


def test_alignment_takes_less_than_a_twentieth_of_tokenizing(benchmark, names):
    texts = read_rows("long")
    student, teacher = (tokenizer.encode_batch(texts) for tokenizer in load_pair(names))
    contenders = (tokenizing_alone(names, texts), lambda: align_batch(student, teacher))
    alone, aligned = benchmark.pedantic(fastest, (time.process_time, *contenders), rounds=1, iterations=1)
    benchmark.extra_info.update(share_of_tokenizing=round(aligned / alone, 4))
    assert aligned / alone < 0.05


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["stories", "long"])
def test_collation_takes_at_most_a_fifth_more_than_tokenizing(benchmark, names, kind, threads):
    """In a process of its own: the library reads its number of threads once."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    command = [sys.executable, __file__, *names, kind, str(threads)]

    def run() -> dict[str, float]:
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(answer.stdout)

    measured = benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info.update(measured)
    assert measured["ratio"] <= 1.2


if __name__ == "__main__":
    student, teacher, kind, threads = sys.argv[1:]
    os.environ["RAYON_NUM_THREADS"] = threads  # read when the library first encodes
    print(json.dumps(measure_collation((student, teacher), kind, int(threads))))
