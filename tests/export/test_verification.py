"""What a fresh process says of an exported folder is compared with the model and the tokenizer."""

import json

import pytest
import torch

from tests.tiny import tiny_folder
from tokenkit.errors import ExportError
from tokenkit.export import fresh_process, verification
from tokenkit.export.verification import random_texts, verify
from tokenkit.models.causal_lm import LoadOptions
from tokenkit.models.reading import read_model
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("verified") / "model", num_hidden_layers=1)


def answers(folder, questions, trusts_code):
    asked, said = folder.parent / "questions.json", folder.parent / "answers.json"
    asked.write_text(json.dumps(questions), encoding="utf-8")
    fresh_process.main(str(folder), str(asked), str(said), "0")
    return json.loads(said.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, ""),
        (lambda found: found["logits"][0].__setitem__(3, 99.0), "the logits are off by"),
        (lambda found: found["ids"][7].append(1), "becomes"),
        (lambda found: found["tokens"].__setitem__(40, "?"), "token 40 is '[?]', not"),
        (lambda found: found.__setitem__("generated", "else"), "the pipeline writes 'else'"),
    ],
    ids=["nothing", "logits", "ids", "tokens", "pipeline"],
)
def test_a_difference_is_named(folder, monkeypatch, capsys, change, words):
    """The process is played here: another test starts a real one."""

    def asked(folder, questions, *, trusts_code):
        found = answers(folder, questions, trusts_code)
        if change is not None:
            change(found)
        return found

    monkeypatch.setattr(verification, "_asked", asked)
    model = read_model(str(folder), LoadOptions(dtype=torch.float32)).eval()
    tokenizer = load_tokenizer(str(folder))
    if change is None:
        verify(folder, model, tokenizer, trusts_code=False)
        said = capsys.readouterr().err
        assert said.count("verified in a fresh process: ") == 4
        assert f"{tokenizer.vocab_size:,} tokens: each id has its string" in said
        return
    with pytest.raises(ExportError, match=words):
        verify(folder, model, tokenizer, trusts_code=False)


def test_random_strings_are_many_and_hold_no_special_token(folder):
    tokenizer = load_tokenizer(str(folder))
    texts = random_texts(tokenizer, 1000)
    assert len(texts) > 990
    assert len(set(texts)) > 950
    assert not any("<s>" in text for text in texts)


def test_a_process_that_fails_is_told_by_its_last_line(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('first', file=sys.stderr)\nsys.exit('no such model')\n")
    monkeypatch.setattr(fresh_process, "__file__", str(program))
    with pytest.raises(ExportError, match="a fresh process does not load it: no such model"):
        verification._asked(tmp_path, {}, trusts_code=False)
