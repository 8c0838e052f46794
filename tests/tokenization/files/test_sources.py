import json

import pytest
from huggingface_hub import constants

from tests.tokenization.tiny import write
from tokenkit.tokenization.tokenizer import load_tokenizer


def refused(*_, **__):
    raise OSError("no road")


def test_a_missing_folder_is_named(tmp_path):
    for name in (str(tmp_path / "none"), "./none", "~/none/at/all"):
        with pytest.raises(FileNotFoundError, match="there is no tokenizer folder"):
            load_tokenizer(name)


def test_a_hub_name_that_cannot_be_read_says_so(monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"no-such-tokenizer': a folder .* does not exist, and offline"
    ):
        load_tokenizer("nobody-here/no-such-tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a readable hub repository \\(no road"):
        load_tokenizer("nobody-here/no-such-tokenizer")


def test_an_empty_folder_says_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer.json, tokenizer.model"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "export").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"folder of a run, and its tokenizer is in .*export: name that"
    ):
        load_tokenizer(str(tmp_path))


def test_a_file_is_not_a_tokenizer(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="a folder or a hub name"):
        load_tokenizer(str(tmp_path / "x.txt"))


def test_the_tokenizer_json_itself_may_be_named(folders):
    folder = folders["byte-level"]
    assert load_tokenizer(str(folder / "tokenizer.json")).vocab_size == load_tokenizer(str(folder)).vocab_size


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": 1}', "\udcff"])
def test_a_broken_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_document_that_the_library_refuses_names_the_tokenizer(tmp_path):
    write(tmp_path, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}, "added_tokens": []})
    with pytest.raises(ValueError, match="cannot be read byte for byte: the tokenizers library refuses"):
        load_tokenizer(str(tmp_path))


def test_a_wordpiece_tokenizer_is_refused_with_its_name(tmp_path):
    write(tmp_path, {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []})
    with pytest.raises(ValueError, match=f"{tmp_path}.*got WordPiece"):
        load_tokenizer(str(tmp_path))


def test_special_tokens_may_stand_in_the_map_and_be_objects(folders, tmp_path):
    document = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    write(tmp_path, document, eos_token=None)
    special = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)


def test_a_chat_template_may_be_a_file_or_a_list(folders, tmp_path):
    document = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    write(tmp_path, document, chat_template=named)
    assert load_tokenizer(str(tmp_path)).chat_template == "a"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert load_tokenizer(str(tmp_path)).chat_template == "c"


def test_remote_code_needs_a_pinned_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(ValueError, match="40-digit commit"):
        load_tokenizer("somebody/something", trust_remote_code=True)


def test_one_token_for_begin_and_end_stands_in_front(folders, tmp_path):
    document = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    write(tmp_path, document, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    family = load_tokenizer(str(tmp_path)).family
    assert family.writes_bos
    assert "unk" not in family.tokens
    (tmp_path / "tokenizer_config.json").write_text("{}")  # named nowhere: the usual strings
    assert load_tokenizer(str(tmp_path)).family.tokens == {"eos": "<|endoftext|>", "bos": "<|endoftext|>"}
