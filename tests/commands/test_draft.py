"""`tokenkit draft`: what is counted, and that a moved draft helps without changing a word."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import TEXT, byte_level_bpe, tiny_folder, tiny_model
from tokenkit.cli import main
from tokenkit.errors import ExitCode
from tokenkit.evaluation.drafts import assist, padding_to
from tokenkit.evaluation.opened import open_model
from tokenkit.evaluation.sampling import Sampling


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    tiny_folder(folder / "target")
    byte_level_bpe(folder / "draft", 280)
    tiny_model(vocab_size=280, seed=2, num_hidden_layers=1).save_pretrained(folder / "draft")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXT[:3]))
    return folder


def test_it_is_measured_before_and_after_the_move(root, tmp_path, capsys):
    words = ["draft", str(root / "target"), str(root / "draft"), "--text", str(root / "text.jsonl")]
    more = ["--prompt-tokens", "6", "--max-new-tokens", "10", "--num-assistant-tokens", "3"]
    out, scores = str(tmp_path / "moved"), tmp_path / "scores.json"
    assert main([*words, *more, "--output", out, "--scores", str(scores)]) == 0
    found = json.loads(scores.read_text())
    assert list(found) == ["target alone", "draft with its own tokenizer", "draft with the target's"]
    for name, one in found.items():
        assert one["same_texts"] == one["prompts"] == 3
        assert one["tokens_per_step"] == pytest.approx(one["tokens"] / one["steps"])
        assert (one["proposed"] > 0) == (name != "target alone")
    assert found["target alone"]["tokens_per_step"] == 1
    assert "acceptance" in capsys.readouterr().out
    assert main(["draft", str(root / "target"), out, *words[3:], *more]) == 0  # what was moved is a draft
    assert "draft with" not in capsys.readouterr().out
    assert main(["draft", str(root / "target"), out, *words[3:], "--output", str(tmp_path / "x"), *more]) != 0
    assert "already" in capsys.readouterr().err


def test_what_is_asked_reaches_those_who_do_it(root, tmp_path, monkeypatch):
    seen = {}

    def assisted(target, draft, prompts, sampling, number):
        seen["asked"] = (
            [ids.shape[1] for ids in prompts],
            sampling,
            number,
            target.model.dtype,
            str(target.device),
        )
        return SimpleNamespace(summary=lambda alone: {})

    def trained(words):
        seen["words"] = words
        return ExitCode.NUMERICS

    monkeypatch.setattr("tokenkit.evaluation.drafts.assist", assisted)
    monkeypatch.setattr("tokenkit.train.main", trained)
    words = {
        "limit": 2, "prompt-tokens": 6, "num-assistant-tokens": 3, "max-new-tokens": 4, "temperature": 0.5,
        "top-k": 7, "top-p": 0.9, "seed": 11, "dtype": "float16", "device": "cpu", "steps": 3,
        "data": "d.txt", "learning-rate": 0.25, "output": tmp_path / "out", "trust-remote-code": "true",
    }  # fmt: skip
    pair = [str(root / "target"), str(root / "draft"), "--text", str(root / "text.jsonl")]
    assert main(["draft", *pair, *(f"--{name}={value}" for name, value in words.items())]) == ExitCode.CONFIG
    sampling = Sampling(max_new_tokens=4, temperature=0.5, top_k=7, top_p=0.9, seed=11)
    assert seen["asked"] == ([6, 6], sampling, 3, torch.float16, "cpu")
    said = " ".join(seen["words"])
    for part in (
        f"--student.pretrained-model-name-or-path {root / 'draft'}", f"--output {tmp_path / 'out'}",
        f"--target-tokenizer-name {root / 'target'}", "--steps 3", "--data.dataset-name d.txt",
        "--optimizer.learning-rate 0.25", "--trust-remote-code", "--losses clm alm_unconstrained",
    ):  # fmt: skip
        assert part in said


def test_a_model_that_is_its_own_draft_keeps_all_that_it_proposes(root):
    prompts = [torch.arange(30, 36)[None], torch.arange(50, 53)[None]]
    sampling = Sampling(max_new_tokens=12)
    with open_model(str(root / "target")) as target, open_model(str(root / "target")) as same:
        alone, helped = assist(target, None, prompts, sampling), assist(target, same, prompts, sampling, 3)
    assert alone.texts == helped.texts
    assert (helped.steps, helped.proposed) == (6, 18)  # 12 tokens are three times 3 + 1
    assert helped.acceptance == 1


def test_rows_of_padding_are_left_out_or_missed(root, tmp_path, capsys):
    prompts, sampling = [torch.arange(30, 36)[None]], Sampling(max_new_tokens=8)
    for rows, ids in ((300, 300), (320, 300), (290, 290)):
        byte_level_bpe(tmp_path / str(rows), ids)
        tiny_model(vocab_size=rows).save_pretrained(tmp_path / str(rows))
    with open_model(str(tmp_path / "300")) as few, open_model(str(tmp_path / "320")) as many:
        with pytest.raises(ValueError, match="pad_to_multiple_of 320"):
            assist(many, few, prompts, sampling)
        assist(few, many, prompts, sampling)
        with open_model(str(tmp_path / "290")) as other:
            other.model.resize_token_embeddings(300)
            with pytest.raises(ValueError, match="as many rows, 300"):
                assist(few, other, prompts, sampling)
    assert "resize_token_embeddings(300)" in capsys.readouterr().err


def test_the_rows_are_those_of_the_target(root):
    assert padding_to(300, 300) == 300
    assert -(-151_665 // padding_to(151_936, 151_665)) * padding_to(151_936, 151_665) == 151_936
    with pytest.raises(ValueError, match="no padding makes 2003"):
        padding_to(2003, 5, largest=2000)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--output", "tests"], "is not empty"),
        (["--steps", "3"], "give it data, and output"),
        (["--data", "tests"], "steps is 0"),
        (["--num-beams", "2"], "not for assisted generation"),
        (["--prompt-tokens", "128"], "of the 128 positions of"),
        (["--prompt-tokens", "90", "--max-new-tokens", "5"], "has 90 tokens: lower prompt_tokens"),
        (["--scores", "tests"], "exists"),
    ],
)
def test_a_mistake_is_one_line(root, capsys, words, reason):
    pair = [str(root / "target"), str(root / "draft"), "--text", str(root / "text.jsonl")]
    assert main(["draft", *pair, *words]) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
