import os
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import TEXT, byte_level_bpe
from tokenkit.data import token_counts
from tokenkit.data.options import DataOptions
from tokenkit.data.token_counts import Counted, count_tokens
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{line} {number}" for number, line in enumerate(TEXT * 10)))
    return DataOptions(dataset_name=str(path))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(token_counts, "BATCH", 7)
    monkeypatch.setattr(token_counts, "SAVE_EVERY", 2)


def by_hand(tokenizer, texts):
    ids = np.concatenate([tokens.ids for tokens in tokenizer.encode_batch(texts)])
    return np.bincount(ids, minlength=tokenizer.vocab_size)


def test_every_document_counts_once(tokenizer, data, tmp_path):
    counts = count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")
    texts = [f"{line} {number}" for number, line in enumerate(TEXT * 10)]
    assert np.array_equal(counts["a"], by_hand(tokenizer, texts))


def test_a_share_takes_about_that_many_documents_and_the_same_for_all(tokenizer, data, tmp_path):
    sides = {"whole": Counted(tokenizer), "a": Counted(tokenizer, 25), "b": Counted(tokenizer, 25)}
    counts = count_tokens(data, sides, tmp_path / "out", seed=3)
    assert np.array_equal(counts["a"], counts["b"])
    assert 0.15 < counts["a"].sum() / counts["whole"].sum() < 0.35


def test_an_interrupted_count_goes_on_where_it_was_saved(tokenizer, data, tmp_path, monkeypatch):
    whole = count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "whole")
    calls, counted = [], token_counts._count

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(token_counts, "_count", interrupted)
    with pytest.raises(KeyboardInterrupt):
        count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "parts")
    calls.clear()
    monkeypatch.setattr(token_counts, "_count", lambda *arguments: (calls.append(1), counted(*arguments))[1])
    resumed = count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "parts")
    assert np.array_equal(resumed["a"], whole["a"])
    assert len(calls) < 200 / 7 - 2
    assert len(list((tmp_path / "parts").iterdir())) == 2


def test_a_complete_count_is_not_repeated(tokenizer, data, tmp_path, monkeypatch):
    first = count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")
    monkeypatch.setattr(token_counts, "_count", None)
    again = count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")
    assert np.array_equal(first["a"], again["a"])


def test_counts_of_something_else_are_refused(tokenizer, data, tmp_path):
    count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")
    with pytest.raises(ValueError, match="holds counts of other seed: give --output another folder"):
        count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out", seed=1)
    with pytest.raises(ValueError, match="holds counts of other sides"):
        count_tokens(data, {"a": Counted(tokenizer, 50)}, tmp_path / "out")


@pytest.mark.parametrize("when", ["complete", "interrupted"])
def test_data_that_changed_under_its_name_is_noticed(tokenizer, data, tmp_path, monkeypatch, when):
    if when == "interrupted":
        monkeypatch.setattr(token_counts, "write_durably", stop_after(3, token_counts.write_durably))
        with pytest.raises(KeyboardInterrupt):
            count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")
        monkeypatch.undo()
    else:
        count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")
    path = Path(data.dataset_name)
    text, times = path.read_text(), path.stat()
    path.write_text(text.replace("0", "1"))  # as long as before, and as old
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match=r"counts of data that changed since: \S+text.txt; give --output"):
        count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")
    path.write_text(text)  # the old content again, newer: nothing changed
    count_tokens(data, {"a": Counted(tokenizer)}, tmp_path / "out")


def stop_after(calls, function):
    left = iter(range(calls))

    def stopping(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopping


def test_a_share_outside_its_range_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"subsample percent must lie in \(0, 100\]: got 0"):
        Counted(tokenizer, 0)
