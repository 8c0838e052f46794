"""`tokenkit bits-per-byte`: figures of any tokenizers over the same bytes, against full logits."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import TEXT, sentencepiece_bpe, tiny_folder, tiny_model
from tokenkit.cli import main
from tokenkit.errors import ExitCode
from tokenkit.evaluation.text_bits import CLASSES, _spread, _windows, classes_of
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    tiny_folder(folder / "a")
    sentencepiece_bpe(folder / "b")
    tiny_model(vocab_size=400, seed=1).save_pretrained(folder / "b")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXT[:5]))
    return folder


def scores(root, tmp_path, *more, models=("a", "b")):
    words = ["--models", *(str(root / name) for name in models), "--output", str(tmp_path / "out.json")]
    assert main(["bits-per-byte", str(root / "text.jsonl"), *words, *more]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def by_full_logits(root, name, window, stride):
    """Bits of all texts, by the logits of transformers and a loop over tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(root / name), load_tokenizer(str(root / name))
    total = 0.0
    for text in TEXT[:5]:
        ids = [tokenizer.bos_id, *tokenizer.encode(text).ids.tolist()]
        for t in range(1, len(ids)):
            start = 0
            while t >= start + window:
                start += stride
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[start:t]])).logits[0, -1]
            total -= float(logits[: tokenizer.vocab_size].log_softmax(-1)[ids[t]]) / math.log(2)
    return total


def test_it_is_the_sum_over_tokens_also_in_windows(root, tmp_path, capsys):
    found = scores(root, tmp_path, "--max-length", "16", "--stride", "5")
    num_bytes = sum(len(text.encode()) for text in TEXT[:5])
    assert found["bytes"] == num_bytes
    for name in ("a", "b"):
        one = found["models"][str(root / name)]
        assert one["bits_per_byte"] == pytest.approx(by_full_logits(root, name, 16, 5) / num_bytes, rel=1e-4)
        shares = found["share_of_bytes_by_class"]
        again = sum(one["bits_per_byte_by_class"][kind] * share for kind, share in shares.items())
        assert again == pytest.approx(one["bits_per_byte"])
    printed = capsys.readouterr().out
    assert "bytes/token" in printed
    (difference,) = found["differences"].values()
    low, high = difference["interval_95"]
    assert low <= difference["difference"] <= high


def test_bytes_have_the_class_of_their_character():
    text = "aé1 .東"
    names = [CLASSES[kind] for kind in classes_of(text)]
    assert names == ["letters"] * 3 + ["digits", "whitespace", "punctuation"] + ["other scripts"] * 3


def test_windows_score_each_token_once_and_bits_are_shared_by_bytes():
    for length, window, stride in ((1, 4, 2), (9, 4, 1), (10, 4, 3), (5, 16, 8)):
        spans = list(_windows(length, window, stride))
        assert [t for _, first, end in spans for t in range(first, end)] == list(range(1, length))
        assert all(start < first and end - start <= window for start, first, end in spans)
    got = _spread(np.array([1.0, 2.0, 6.0, np.nan]), np.array([0, 1, 4, 5]), 5)
    np.testing.assert_array_equal(got, [3.0, 2.0, 2.0, 2.0, np.nan])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--models", "nowhere/at/all"], "does not exist"),
        (["--models", "a", "a"], "must name each model once"),
        (["--models", "org/a", "--stride", "512"], "stride must be at most 511"),
        (["--models", "org/a", "--output", "."], "exists"),
        (["--models", "model", "--limit", "0"], "limit must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(root, capsys, words, reason):
    assert main(["bits-per-byte", str(root / "text.jsonl"), *words]) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
