import json

import pytest

from tests.integrations.material import randomised
from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_model
from tokenkit.data.collate import AlignedCollator
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A student's and a teacher's tokenizer: byte-level BPE, and SentencePiece's form."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return byte_level_bpe(folder / "student"), sentencepiece_bpe(folder / "teacher")


@pytest.fixture(scope="session")
def tokenizers(folders):
    return tuple(load_tokenizer(str(folder)) for folder in folders)


@pytest.fixture
def make_collator(tokenizers):
    def make(**options):
        return AlignedCollator(*tokenizers, max_length_student=64, max_length_teacher=64, **options)

    return make


@pytest.fixture
def models(tokenizers):
    """A student and a teacher of another architecture, every parameter random."""
    student = randomised(tiny_model("llama", vocab_size=tokenizers[0].vocab_size + 4))
    teacher = randomised(tiny_model("gpt2", vocab_size=tokenizers[1].vocab_size, seed=1))
    return student, teacher


@pytest.fixture(scope="session")
def rows():
    """Eight rows of unequal length."""
    lengths = (3, 9, 40, 5, 60, 12, 4, 30)
    return [{"text": (TEXT[i % 5] * 2)[:n]} for i, n in enumerate(lengths)]


@pytest.fixture
def rows_file(rows, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
