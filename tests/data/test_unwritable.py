"""Characters that one tokenizer cannot write: the row is left out, or they are, counted and said."""

import logging

import pytest

from tests.tokenization.tiny import lacking_bytes
from tokenkit.data.collate import AlignedCollator
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.tokenization.written import writable_text


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    return load_tokenizer(str(lacking_bytes(tmp_path_factory.mktemp("lacking"))))


def texts(collator, batch):
    tokenizer = collator.student_tokenizer
    lengths = batch.student.length_B.tolist()
    return [tokenizer.decode(ids[:n]) for ids, n in zip(batch.student.ids_BT.tolist(), lengths, strict=True)]


ROWS = [{"text": "the cat"}, {"text": "a 🙂 smile 🙂, 日 naïve"}, {"text": "the mat"}]


@pytest.mark.parametrize(
    ("unencodable", "second"),
    [("skip", None), ("drop", "a  smile ,  naïve"), ("replace", "a  smile ,  naïve")],
)
def test_the_row_or_its_characters_are_left_out(lacking, byte_tokenizer, caplog, unencodable, second):
    for pair in ((lacking, byte_tokenizer), (byte_tokenizer, lacking), (lacking, None)):
        collator = AlignedCollator(*pair, unencodable=unencodable)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = texts(collator, collator(ROWS))
        if second is None:
            assert found == ["the cat", "the mat"]
            assert collator.skipped.total() == 1
            assert "data.bad_rows.unencodable can keep such rows" in caplog.text
        else:
            assert found == ["the cat", second, "the mat"]
            assert collator.altered == {"characters": 3, "rows": 1}
            assert not collator.skipped
            assert f"cannot write: {unencodable}" in caplog.text


def test_characters_are_replaced_by_what_both_can_write(byte_tokenizer, lacking):
    # neither U+FFFD nor ? can be written by the one, so nothing stands for them
    assert writable_text("a🙂b", [lacking], "replace") == ("ab", 1)
    assert writable_text("a🙂b", [byte_tokenizer], "replace") == ("a🙂b", 0)


def test_messages_are_mended_one_by_one(lacking, byte_tokenizer):
    said = [{"role": "user", "content": "🙂?"}, {"role": "assistant", "content": "yes 日"}]
    collator = AlignedCollator(lacking, byte_tokenizer, unencodable="drop")
    batch = collator([{"messages": said}])
    assert collator.altered == {"characters": 3, "rows": 1}
    assert "yes " in texts(collator, batch)[0]


def test_a_row_of_nothing_else_stays_out(lacking, byte_tokenizer):
    collator = AlignedCollator(lacking, byte_tokenizer, unencodable="drop")
    collator([{"text": "🙂🙂"}, {"text": "a"}])
    assert collator.skipped.total() == 1
    assert not collator.altered


def test_another_word_is_refused(lacking):
    with pytest.raises(ValueError, match="unencodable is one of skip, drop, replace: got 'keep'"):
        AlignedCollator(lacking, unencodable="keep")
