"""`tokenkit generate`: the text of transformers' own `generate`, shown as it comes."""

import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.test_expanded import byte_student, exported
from tests.tiny import tiny_folder
from tokenkit.cli import main
from tokenkit.commands.generate import GenerateConfig, converse, positions
from tokenkit.errors import ExitCode
from tokenkit.evaluation.generation import TextStream
from tokenkit.evaluation.opened import open_model
from tokenkit.evaluation.sampling import Sampling
from tokenkit.tokenization.tokenizer import load_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("generate") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def by_transformers(folder, prompt, **settings):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**given, pad_token_id=0, max_new_tokens=12, **settings)[
        0, given.input_ids.shape[1] :
    ]
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {"do_sample": False}),
        (["--num-beams", "3"], {"do_sample": False, "num_beams": 3}),
        (
            ["--temperature", "0.7", "--top-p", "0.9", "--seed", "3"],
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        ),
    ],
)
def test_it_writes_what_transformers_writes(model, capsys, words, settings):
    torch.manual_seed(3)
    wanted = by_transformers(model, "The cats, the", **settings)
    assert main(["generate", str(model), "The cats, the", "--max-new-tokens", "12", *words]) == 0
    assert capsys.readouterr().out == wanted + "\n"


def test_a_stop_text_ends_it_and_is_not_written(model, tmp_path, capsys):
    whole = by_transformers(model, "The cats", do_sample=False)
    stop = whole[5:7]
    words = ["--max-new-tokens", "12", "--stop", stop, "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", str(model), "The cats", "A dog", *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (rows[0]["text"], rows[0]["ended"]) == (whole[: whole.index(stop)], "stop")
    assert [row["prompt"] for row in rows] == ["The cats", "A dog"]
    assert capsys.readouterr().out.startswith(f"> The cats\n{rows[0]['text']}\n> A dog\n")


def test_half_characters_and_half_stop_texts_wait():
    said = []
    stream = TextStream(load_tokenizer("byte"), ["</end>"], said.append)
    stream.put(torch.tensor([[65, 66]]))
    for byte in "é<a</en!</end> more".encode():
        stream.put(torch.tensor([byte]))
    stream.end()
    assert said[:3] == ["é", "<a", "</en!"]
    assert stream.text == "é<a</en!"
    stream = TextStream(load_tokenizer("byte"), ["xyz"], said.append)
    stream.put(torch.tensor([[1]]))
    stream.add(b"ab xy\xc3")
    stream.end()
    assert stream.text == "ab xy�"


def test_a_byte_model_with_expansion_writes_too(tmp_path, capsys):
    student, new = byte_student("llama", tmp_path)
    exported(student, new, tmp_path / "out")
    words = ["generate", str(tmp_path / "out"), "the cat", "--max-new-tokens", "6"]
    assert main([*words, "--trust-remote-code"]) == 0
    assert capsys.readouterr().out.strip("\n")
    assert main(words) == ExitCode.DATA
    assert "trust_remote_code" in capsys.readouterr().err


def test_a_chat_is_one_message_or_a_conversation(model, capsys):
    wanted = by_transformers(model, "system: S\nuser: hi\nassistant: ", do_sample=False)
    assert main(["generate", str(model), "--chat", "hi", "--system", "S", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip() == wanted.strip()

    config = GenerateConfig(model=str(model), chat=True, sampling=Sampling(max_new_tokens=3))
    lines = iter(["hi", "", "/new", "again " * 200, "hi", "/exit"])
    with open_model(str(model)) as opened:
        converse(opened, config, lambda _: next(lines))
    shown = capsys.readouterr()
    first, last = shown.out.splitlines()
    assert first == last
    assert "positions: give a shorter one, or begin anew with /new" in shown.err


def test_prompts_come_from_a_file_or_standard_input(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "The cats"}\n\n{"text": "A dog"}\n', encoding="utf-8")
    (tmp_path / "p.txt").write_text("The cats\n", encoding="utf-8")
    more = ["--max-new-tokens", "4"]
    assert main(["generate", str(model), "--prompt-file", str(tmp_path / "p.jsonl"), *more]) == 0
    assert capsys.readouterr().out.count("> ") == 2
    assert main(["generate", str(model), "--prompt-file", str(tmp_path / "p.txt"), *more]) == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("The cats\n"))
    assert main(["generate", str(model), *more]) == 0
    assert capsys.readouterr().out == from_file


def test_words_before_the_flags_are_model_and_prompts():
    assert positions(["m", "a, b", "[c]", "--seed", "1"]) == [
        "--model=m",
        '--prompts=["a, b", "[c]"]',
        "--seed",
        "1",
    ]
    assert positions(["m", "--chat", "hi", "--seed=1"]) == [
        "--model=m",
        '--prompts=["hi"]',
        "--chat=true",
        "--seed=1",
    ]
    assert positions(["m", "Hi 🎉"]) == ["--model=m", '--prompts=["Hi 🎉"]']
    assert positions(["m", "--chat", "true"]) == ["--model=m", "--chat", "true"]
    assert positions(["model=m", "chat=true"]) == ["model=m", "chat=true"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere/at/all", "x"], "nowhere/at/all"),
        (["MODEL", "x", "--top-k", "5"], "temperature 0 takes the likeliest"),
        (["MODEL", "x", "--system", "s"], "set chat too"),
        (["MODEL", "x", "--prompt-file", "pyproject.toml"], "keep one of them"),
        (["MODEL", "x", "--output", "."], "exists"),
        (["MODEL", "x", "--output", "nowhere/at/all.jsonl"], "the folder nowhere/at does not exist"),
        (["MODEL", "x", "--device", "foo"], "device must be cpu, cuda or cuda:N"),
        (["MODEL", "x", "--device", "cuda:99"], "this machine shows"),
        (["MODEL", "--prompt-file", "nowhere.txt"], "does not exist"),
        (["MODEL", "the " * 200], "positions: give a shorter one"),
    ],
)
def test_a_mistake_is_one_line(model, capsys, words, reason):
    words = [str(model) if word == "MODEL" else word for word in words]
    assert main(["generate", *words]) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1


def test_a_tokenizer_without_a_template_has_no_chat(tmp_path, capsys):
    tiny_folder(tmp_path / "plain")
    assert main(["generate", str(tmp_path / "plain"), "hi", "--chat"]) == ExitCode.DATA
    assert "has no chat template" in capsys.readouterr().err
