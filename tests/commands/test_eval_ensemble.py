"""`tokenkit eval-ensemble`: what is asked of several models, from the command line."""

import json
import math
import shutil

import pytest
import torch

from tests.tiny import TEXT, byte_level_bpe, tiny_folder, tiny_model
from tokenkit.cli import door, main
from tokenkit.commands.eval_ensemble import ALIASES, EvalEnsembleConfig
from tokenkit.config import parse_command_line
from tokenkit.errors import DataError, ExitCode
from tokenkit.evaluation import members
from tokenkit.evaluation.opened import open_model
from tokenkit.evaluation.sampling import Sampling


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    tiny_folder(folder / "a")
    tiny_folder(folder / "b", "gpt2", seed=1)
    byte_level_bpe(folder / "c", 320)
    tiny_model(vocab_size=320, seed=2).save_pretrained(folder / "c")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXT[:5]))
    return folder


def names(root, *which):
    return [str(root / name) for name in which]


def test_bits_per_byte_are_those_of_the_mean_and_members_those_of_the_other_door(root, tmp_path, capsys):
    text, more = str(root / "text.jsonl"), ["--max-length", "16", "--stride", "5"]
    words = [*names(root, "a", "b"), "--weights", "3", "1", "--output", str(tmp_path / "out")]
    assert (
        main(
            ["eval-ensemble", *words, "--text", text, *more, "--prompts", "The cat", "--max-new-tokens", "3"]
        )
        == 0
    )
    found = json.loads((tmp_path / "out" / "bits_per_byte.json").read_text())["models"]
    assert "> The cat\n" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "out" / "texts.jsonl").read_text().splitlines())
    assert row["tokens"] == 3
    alone = [*more, "--output", str(tmp_path / "alone.json"), "--models", *names(root, "a", "b")]
    assert main(["bits-per-byte", text, *alone]) == 0
    for name, one in json.loads((tmp_path / "alone.json").read_text())["models"].items():
        assert found[name]["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
    ensemble = found["ensemble (mean_prob)"]["bits_per_byte"]
    assert ensemble == pytest.approx(by_full_logits(root, (0.75, 0.25), 16, 5), rel=1e-4)


def test_what_is_asked_reaches_those_who_do_it(root, tmp_path, monkeypatch):
    seen = {}

    def opening(models, mappings, **how):
        seen["opened"] = [m.pretrained_model_name_or_path for m in models], list(mappings), how
        return real(models, mappings, **how)

    def writing(opened, ids_1T, sampling, *_):
        seen["sampling"] = sampling
        raise DataError("seen")

    real = members.open_members
    monkeypatch.setattr(members, "open_members", opening)
    monkeypatch.setattr("tokenkit.evaluation.generation.generate", writing)
    words = {
        "prompts": "The cat", "max-new-tokens": 4, "temperature": 0.5, "top-k": 7, "top-p": 0.9, "seed": 11,
        "num-beams": 2, "stop": "x", "dtype": "bfloat16", "device": "cpu", "trust-remote-code": "true",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in words.items()]
    assert main(["eval-ensemble", *names(root, "a", "b"), *flags]) == ExitCode.DATA
    how = {"dtype": torch.bfloat16, "device": "cpu", "trust_remote_code": True}
    assert seen["opened"] == (names(root, "a", "b"), [None, None], how)
    assert seen["sampling"] == Sampling(
        max_new_tokens=4, temperature=0.5, top_k=7, top_p=0.9, seed=11, num_beams=2, stop=("x",)
    )


def by_full_logits(root, weights, window, stride):
    """A loop over tokens, with the logits of transformers."""
    nats = 0.0
    with open_model(str(root / "a")) as one, open_model(str(root / "b")) as other, torch.no_grad():
        for text in TEXT[:5]:
            ids = [one.tokenizer.bos_id, *one.tokenizer.encode(text).ids.tolist()]
            for t in range(1, len(ids)):
                start = max(0, -(-(t + 1 - window) // stride) * stride)
                given = torch.tensor([ids[start:t]])
                shares = [m.model(input_ids=given).logits[0, -1].softmax(-1)[ids[t]] for m in (one, other)]
                nats -= math.log(sum(w * float(p) for w, p in zip(weights, shares, strict=True)))
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXT[:5])


def test_a_member_with_another_tokenizer_needs_a_mapping(root, tmp_path, capsys):
    asked = ["--text", str(root / "text.jsonl"), "--prompts", "The cat", "--max-new-tokens", "2"]
    assert main(["eval-ensemble", *names(root, "a", "c"), *asked]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert "have different tokenizers (300 and 320 ids)" in error
    pair = ["--target-tokenizer-name", str(root / "a"), "--teacher-tokenizer-name", str(root / "c")]
    assert main(["mined-mapping", *pair, "--output", str(tmp_path / "mapping")]) == 0
    for given in (["null", str(tmp_path / "mapping")], [str(tmp_path / "mapping" / "mapping.npy")]):
        for strategy in ("mean_logits", "max"):
            mapped = ["--baseline-mined-mapping-paths", *given, "--combine-strategy", strategy]
            assert main(["eval-ensemble", *names(root, "a", "c"), *asked, *mapped]) == 0
    mapped = ["--baseline-mined-mapping-paths", str(tmp_path / "mapping")]
    assert main(["eval-ensemble", *names(root, "c", "a"), *asked, *mapped]) == ExitCode.DATA
    assert "was mined for another" in capsys.readouterr().err


def test_benchmarks_ask_the_ensemble(root, tmp_path, capsys):
    """A model and itself have the scores of the model: of likelihoods and of answers."""
    (tmp_path / "data").mkdir()
    rows = [{"context": text[:20], "continuation": " cats"} for text in TEXT[:3]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "lambada_openai.jsonl").write_text(lines)
    shutil.copytree(root / "a", tmp_path / "again")
    asked = ["--eval.tasks", "lambada_openai", "--eval.task-data", str(tmp_path / "data")]
    asked += ["--eval.limit", "2", "--eval.num-fewshot", "1", "--eval.batch-size", "2"]
    out = tmp_path / "out"
    words = [str(root / "a"), str(tmp_path / "again"), *asked, "--output", str(out)]
    assert main(["eval-ensemble", *words]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["combine_strategy"] == "mean_prob"
    assert found["n-samples"]["lambada_openai"]["effective"] == 2
    assert found["n-shot"]["lambada_openai"] == 1
    alone = [word.replace("--eval.", "--") for word in asked]
    assert main(["eval", str(root / "a"), *alone, "--output", str(tmp_path / "alone")]) == 0
    wanted = json.loads((tmp_path / "alone" / "results.json").read_text())["results"]["lambada_openai"]
    one = found["results"]["lambada_openai"]
    assert one["perplexity,none"] == pytest.approx(wanted["perplexity,none"], rel=1e-4)
    assert "ensemble (mean_prob)" in capsys.readouterr().out


def test_the_file_of_other_programs_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PIVOT", "org/a")
    monkeypatch.setenv("OTHER", "org/b")
    name, words = door(["eval_lockstep", "combine_strategy=max"])
    config = parse_command_line(EvalEnsembleConfig, words, program=name, aliases=ALIASES)
    assert [m.pretrained_model_name_or_path for m in config.models] == ["org/a", "org/b"]
    assert config.combining.combine_strategy == "max"
    content = """
models:
  - {pretrained_model_name_or_path: org/a, tokenizer_name: 'org/a:source=Qwen2'}
  - pretrained_model_name_or_path: org/b
combine_strategy: mean_logits
baseline_mined_mapping_paths: [null, MAPPING]
ppl_eval_data: text.txt
""".replace("MAPPING", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(content)
    config = parse_command_line(
        EvalEnsembleConfig, ["--config", str(tmp_path / "mine.yaml")], program=name, aliases=ALIASES
    )
    assert config.models[0].tokenizer_name == "org/a:source=Qwen2"
    assert config.combining.mappings(2) == [None, str(tmp_path)]
    assert config.scoring.text == "text.txt"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["org/a", "--prompts", "x"], "at least two models"),
        (["org/a", "org/a", "--prompts", "x"], "each once"),
        (["org/a", "org/b"], "nothing is asked"),
        (["org/a", "org/b", "--prompts", "x", "--weights", "1"], "one number for each of 2 models"),
        (["org/a", "org/b", "--prompts", "x", "--weights", "1", "0"], "weights must be above 0"),
        (["org/a", "org/b", "--prompts", "x", "--combine-strategy", "weighted"], "needs weights"),
        (
            ["org/a", "org/b", "--prompts", "x", "--combine-strategy", "max", "--weights", "1", "2"],
            "leave one out",
        ),
        (
            ["org/a", "org/b", "--prompts", "x", "--baseline-mined-mapping-paths", "no/where"],
            "does not exist",
        ),
        (
            ["org/a", "org/b", "--prompts", "x", "--baseline-mined-mapping-paths", ".", "."],
            "for each of 2 models",
        ),
        (["no/where/a", "org/b", "--prompts", "x"], "no/where/a"),
        (["org/a", "org/b", "--prompts", "x", "--output", "tests"], "is not empty"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, reason):
    assert main(["eval-ensemble", *words]) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
