"""Tokenizer files with something wrong in them: refused in one line, or read and saved with the same ids."""

import copy
import json

import pytest

from tests.tokenization.tiny import CHATML, write
from tokenkit.tokenization.files.saving import explain_saving
from tokenkit.tokenization.tokenizer import load_tokenizer

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
TEXT = "The cat sat; concat a cat on the catalog  cat word word"


@pytest.fixture
def changed(folders, tmp_path):
    """Load a byte-level tokenizer whose document was changed by a function of it and of its next id."""
    source = json.loads((folders["byte-level"] / "tokenizer.json").read_text())

    def load(change):
        document = copy.deepcopy(source)
        ids = [*document["model"]["vocab"].values(), *(token["id"] for token in document["added_tokens"])]
        change(document, 1 + max(ids))
        folder = write(
            tmp_path / "changed",
            document,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHATML,
        )
        return load_tokenizer(str(folder))

    return load


def added(content, **flags):
    def change(document, next_id):
        gap = flags.pop("gap", 0)
        document["added_tokens"].append({"id": next_id + gap, "content": content, **FLAGS, **flags})

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda document, next_id: document["model"].update(dropout=0.5),
        added("<|hole|>", special=True, gap=7),
        added("word", gap=7),
        added("cat", single_word=True),
        added("cat", normalized=True),
        added("cat"),
    ],
    ids="dropout hole-special hole-word single_word normalized word".split(),
)
def test_what_is_read_is_what_the_saved_tokenizer_reads(changed, tmp_path, change):
    from transformers import AutoTokenizer

    tokenizer = changed(change)
    tokenizer.save(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (TEXT, "  x    y", "cat"):
        canonical = tokenizer.normalize(text)
        expected = tokenizer.encode(canonical).ids.tolist()
        assert loaded(canonical, add_special_tokens=False)["input_ids"] == expected
    for string, token_id in tokenizer.control.items():
        assert loaded(string, add_special_tokens=False)["input_ids"] == [token_id]


def test_what_the_saved_tokenizer_reads_otherwise_is_said(changed):
    assert explain_saving(changed(lambda document, next_id: None)) is None
    assert "BPE dropout of 0.5 is off" in explain_saving(
        changed(lambda document, next_id: document["model"].update(dropout=0.5))
    )
    assert "special tokens that are words ('cat')" in explain_saving(changed(added("cat", special=True)))


def nested(document, next_id):
    part = document["pre_tokenizer"]
    for _ in range(300):
        part = {"type": "Sequence", "pretokenizers": [part]}
    document["pre_tokenizer"] = part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (added("cat", lstrip=True), r"'cat' is a word that swallows the whitespace beside it \(lstrip\)"),
        (added("cat", rstrip=True), r"'cat' is a word that swallows the whitespace beside it \(rstrip\)"),
        (
            lambda d, n: d["added_tokens"].append({"content": "x"}),
            "not of the tokenizers library's form.*'id'",
        ),
        (lambda d, n: d["added_tokens"].append("x"), "not of the tokenizers library's form"),
        (lambda d, n: d["model"].update(vocab=["a", "b"]), "cannot be read byte for byte|library's form"),
        (lambda d, n: d["model"]["vocab"].update(zz="1"), "library's form"),
        (lambda d, n: d["model"]["vocab"].update(zz=10**8), "largest id is 100,000,000, for 449 tokens"),
        (lambda d, n: d.update(pre_tokenizer={"x": 1}), "library's form"),
        (lambda d, n: d.update(pre_tokenizer=[1]), "library's form"),
        (lambda d, n: d.update(normalizer="NFC"), "library's form"),
        (nested, "nested too deeply|cannot be read byte for byte"),
    ],
    ids="lstrip rstrip no-id string vocab id-text id-huge part list normalizer nested".split(),
)
def test_files_of_another_form_are_refused_in_one_line(changed, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        changed(change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        ("tokenizer.json", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n", "is a tiktoken file"),
        ("tokenizer.model", b'{"config": {}, "vocab": []}', "is JSON, not a SentencePiece model"),
    ],
    ids="list object lfs lfs-model tiktoken json".split(),
)
def test_files_of_another_kind_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_mark_before_the_json_is_no_text(folders, tmp_path):
    content = (folders["byte-level"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert load_tokenizer(str(tmp_path)).vocab_size == load_tokenizer(str(folders["byte-level"])).vocab_size


def backtracking(document, next_id):
    pattern = {"Regex": "(x+x+)+y"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}


def test_a_panic_of_the_library_is_an_error_of_the_text(changed):
    tokenizer = changed(backtracking)
    assert len(tokenizer.encode("xxxy x").ids)
    for run in (tokenizer.encode, tokenizer.normalize, lambda text: tokenizer.try_encode_batch(["a", text])):
        with pytest.raises(ValueError, match="the tokenizers library gave up on a text: Onig"):
            run("x" * 40)
