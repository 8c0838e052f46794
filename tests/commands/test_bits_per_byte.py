"""`tokenkit bits-per-byte`: figures of any tokenizers over the same bytes, against full logits."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tokenkit
from tests.tiny import TEXT, sentencepiece_bpe, tiny_folder, tiny_model
from tokenkit.cli import main
from tokenkit.data.collate import AlignedCollator
from tokenkit.errors import ExitCode
from tokenkit.evaluation.bits_per_byte import bits_per_byte, heldout_batches
from tokenkit.evaluation.byte_shares import place, shares
from tokenkit.evaluation.scripts import classes_of
from tokenkit.evaluation.text_bits import windows
from tokenkit.models.causal_lm import CausalLM
from tokenkit.parallel import World
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.ragged import FlatTokens
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.distillation import Distillation


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


def test_the_front_door_the_command_and_training_say_the_same(root, tmp_path):
    found = scores(root, tmp_path, "--max-length", "128", "--batch-size", "3", models=("b",))
    model = AutoModelForCausalLM.from_pretrained(root / "b")
    front = tokenkit.bits_per_byte(model, str(root / "b"), TEXT[:5], max_length=128)
    (one,) = found["models"].values()
    assert one["bits_per_byte"] == pytest.approx(front, rel=1e-6)
    tokenizers = [load_tokenizer(str(root / name)) for name in ("a", "b")]
    both = AlignedCollator(*tokenizers, max_length_student=128, max_length_teacher=128)
    sides = [CausalLM(AutoModelForCausalLM.from_pretrained(root / n), t.vocab_size)
             for n, t in zip("ab", tokenizers, strict=True)]  # fmt: skip
    batches = heldout_batches([Document(text=text) for text in TEXT[:5]], both)
    trained = bits_per_byte(Distillation(*sides, {}), batches, World(0, 1, torch.device("cpu"), None))
    (tmp_path / "out.json").unlink()
    pair = scores(root, tmp_path, "--max-length", "128", "--plot", str(tmp_path / "bars.png"))["models"]
    assert [trained.student, trained.teacher] == pytest.approx(
        [pair[str(root / name)]["bits_per_byte"] for name in "ab"], rel=1e-6
    )
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_have_the_class_of_their_character():
    text = "aé1 .東ひラ한ж\u0301αعשकाกதሀ"
    names, kinds = classes_of(text)
    found = [names[kinds[len(text[:at].encode())]] for at in range(len(text))]
    assert found == [
        "Latin letters", "Latin letters", "digits", "whitespace", "punctuation and symbols", "Han",
        "Hiragana", "Katakana", "Hangul", "Cyrillic", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari",
        "Devanagari", "Thai", "Tamil", "Ethiopic",
    ]  # fmt: skip
    assert len(kinds) == len(text.encode())


def test_windows_score_each_token_once():
    for length, window, stride in ((1, 4, 2), (9, 4, 1), (10, 4, 3), (5, 16, 8)):
        spans = list(windows(length, window, stride))
        assert [t for _, first, end in spans for t in range(first, end)] == list(range(1, length))
        assert all(start < first and end - start <= window for start, first, end in spans)


def test_bits_are_shared_by_bytes_and_sides_share_what_counts(root):
    """By hand: BOS, a token without width, one of 3 bytes, an unknown one | one that no model predicts."""
    tokenizer = replace_unk(load_tokenizer(str(root / "b")), 7)

    def side(ids, ends, special):
        mask = np.array(special, bool)
        return FlatTokens(
            np.array(ids, np.int32), np.array(ends), mask, ~mask | True, np.array([0, len(ids)])
        )

    left = side([1, 5, 6, 6, 7], [1, 1, 2, 5, 6], [1, 0, 0, 0, 0])
    right = side([5, 6, 6], [3, 5, 6], [0, 0, 0])
    (placed, _), start_B = place((left, right), (tokenizer, tokenizer))
    got = placed.spread(np.array([9, 1.0, 2.0, 6.0, 4.0]), int(start_B[-1]))
    np.testing.assert_array_equal(got, [np.nan, 3.0, 2.0, 2.0, 2.0, np.nan])
    found = shares((left, right), (tokenizer, tokenizer))
    np.testing.assert_allclose(found.share_N[0], [0, 0, 0, 2 / 3, 0])
    np.testing.assert_allclose(found.share_N[1], [0, 1, 0])
    assert found.num_bytes == 2


def replace_unk(tokenizer, unk_id):
    return SimpleNamespace(unk_id=unk_id, bos_id=tokenizer.bos_id)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--models", "nowhere/at/all"], "does not exist"),
        (["--models", "nowhere"], "model folder nowhere does not exist, and offline"),
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
