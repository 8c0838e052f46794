"""Long documents: only their beginning is tokenized, and its tokens are those of the whole."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import OWN_DATA, SHARED_DATA, tokenizer_folder
from tests.tokenization import tiny
from tokenkit.data.collate import AlignedCollator, beginning
from tokenkit.tokenization.chat.documents import Document, Message
from tokenkit.tokenization.chat.encode import encode_flat
from tokenkit.tokenization.ragged import cut
from tokenkit.tokenization.tokenizer import load_tokenizer

KINDS = (tiny.byte_level, tiny.sentencepiece_bpe, tiny.unigram, tiny.metaspace)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return [load_tokenizer(str(make(root / make.__name__))) for make in KINDS]


def check(document, pair, lengths, mode="direct_encode"):
    """Compare what is kept of the beginning with what is kept of the whole; return the characters read."""

    def encode(documents):
        return encode_flat(documents, pair, mode=mode)

    short = beginning(document, lengths, encode)
    whole, part = encode([document]), encode([short])
    for one, other, length in zip(whole, part, lengths, strict=True):
        for name in ("ids_N", "byte_ends_N", "special_N", "trained_N"):
            assert np.array_equal(getattr(cut(one, length), name), getattr(cut(other, length), name))
    return sum(map(len, short.says))


UNITS = st.text(st.sampled_from("ab c\n\t.1'eé\u0301\u0323日本🙂 \u00a0ﬁ"), min_size=1, max_size=12)


@settings(max_examples=8)
@given(st.lists(UNITS, min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 3), st.integers(1, 40))
def test_any_long_text_begins_with_the_tokens_of_the_whole(kinds, units, student, teacher, length):
    unit = "".join(units)
    if not unit.strip():
        unit += "a"
    document = Document(text=unit * (12_000 // len(unit)))
    try:
        encode_flat([document], (kinds[student], kinds[teacher]), mode="direct_encode")
    except ValueError:
        return  # the text cannot be written, or never settles
    check(document, (kinds[student], kinds[teacher]), (length, 2 * length))


RUNS = {
    "spaces": " " * 30_000 + "end",
    "one letter": "a" * 30_000,
    "marks": "e" + "\u0301\u0323" * 15_000,
    "newlines": "a" + "\n" * 30_000,
    "words": "The cat sat on the mat. " * 1500,
    "no words": "日本語のテキスト" * 4000,
}


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS)
def test_runs_without_an_end_are_read_as_far_as_they_decide(kinds, text):
    for tokenizer in kinds[:2]:
        read = check(Document(text=text), (tokenizer, kinds[2]), (20, 20))
    if text.startswith("The"):
        assert read < 5000


@pytest.mark.parametrize("name", ["bytelevel2k", "spm1k", "llama2", "t5-small", "qwen2.5-sub8000"])
def test_real_tokenizers_on_real_text(name):
    tokenizer = load_tokenizer(str(tokenizer_folder(name)))
    if (OWN_DATA / "tokenizers" / name).is_dir():
        own = (OWN_DATA / "text" / "scripts.txt").read_text(encoding="utf-8")
        check(Document(text=own * 8), (tokenizer,), (64,))
        return
    wikitext = (SHARED_DATA / "text/wikitext2.valid.txt").read_text()[:60_000]
    scripts = "".join(path.read_text()[:2000] for path in sorted((SHARED_DATA / "text/udhr").glob("*.txt")))
    for text in (wikitext, scripts):
        check(Document(text=text), (tokenizer,), (64,))


def test_messages_keep_what_stands_around_them(kinds):
    said = [Message("user", "a question " * 30), Message("assistant", "words " * 6000)] * 3
    pair = (kinds[0], kinds[0])
    read = check(Document(messages=tuple(said)), pair, (100, 150), mode="surround_instruct")
    assert read < 6000
    prompt = (Message("user", "x " * 9000), Message("assistant", "y " * 9000))
    check(Document(messages=prompt, is_pair=True), pair, (50, 50))


def test_short_documents_are_left_as_they_are(kinds):
    document = Document(text="word " * 1000)
    assert beginning(document, (128, 128), lambda documents: pytest.fail("encoded")) is document


def test_an_enormous_row_takes_the_time_of_its_beginning(kinds):
    collator = AlignedCollator(kinds[0], kinds[1], max_length_student=256, max_length_teacher=256)
    row = {"text": "The cat sat on the mat, and the dog ran away. " * 45_000}  # 2 MB
    collator([{"text": row["text"][:100_000]}])
    began = time.process_time()
    batch = collator([row])
    assert time.process_time() - began < 0.5  # 0.04 s; all of it: 4 s
    assert batch.student.ids_BT.shape == (1, 256)
