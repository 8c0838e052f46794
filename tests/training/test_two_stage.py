"""The recipe of configs/two_stage: the embeddings alone, then adapters from their export, by the command."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.test_resume import curve
from tokenkit.config import ALIASES, TrainConfig, parse_command_line
from tokenkit.embeddings.rows import row_sources
from tokenkit.models.causal_lm import CausalLM
from tokenkit.parallel import World
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.train import main
from tokenkit.training.build import build

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = (
    "--dtype float32 --steps 4 --warmup-steps 0 --batch-size 4 --gradient-accumulation-steps 1 "
    "--eval-interval 4 --max-length-new 48 --max-length-teacher 64 --model-lora-rank 4 "
    "--optimizer.learning-rate 0.01 --data.heldout.fraction 0.1 --data.num-workers 0 --eval-at-step-zero"
).split()
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


def words(stage):
    files = [CONFIGS / "cross_tokenizer_distill.yaml", CONFIGS / "two_stage" / stage]
    return ["--config", *map(str, files), *SMALL]


def bits(folder, side):
    return [line[f"bits_per_byte/{side}"] for line in curve(folder) if f"bits_per_byte/{side}" in line]


@pytest.fixture
def folders(workspace, tmp_path, monkeypatch):
    named = {"STUDENT": "model", "TARGET": "target", "DATA": "data.jsonl"}
    for name, file in named.items():
        monkeypatch.setenv(name, str(workspace / file))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    return tmp_path / "two_stage" / "embeddings", tmp_path / "two_stage" / "lora"


def test_embeddings_first_and_then_adapters(workspace, folders):
    first, second = folders
    assert main(words("1_embeddings.yaml")) == 0
    original = load_file(workspace / "model" / "model.safetensors")
    moved = load_file(first / "export" / "model.safetensors")
    assert original.keys() == moved.keys()
    body = sorted(original.keys() - EMBEDDINGS)
    assert all(torch.equal(original[name], moved[name]) for name in body)
    old, target = (load_tokenizer(str(workspace / name)) for name in ("model", "target"))
    sources = row_sources(old, target)
    for name in EMBEDDINGS & original.keys():
        begin = sources.rows(original[name], len(moved[name]))[: target.vocab_size]
        assert not torch.allclose(moved[name][: target.vocab_size], begin, atol=1e-3)

    config = parse_command_line(TrainConfig, words("2_lora.yaml"), program="test", aliases=ALIASES)
    parts = build(config, World(0, 1, torch.device("cpu"), None))
    used = len(target.token_bytes)
    assert torch.equal(parts.student.embedding.weight[:used], moved["model.embed_tokens.weight"][:used])
    teacher = parts.run.model.teacher
    assert isinstance(teacher, CausalLM)
    assert all(torch.equal(original[n], p) for n, p in teacher.causal_lm.named_parameters() if n in original)
    assert parts.tokenizers.teacher.fingerprint() == old.fingerprint()
    assert parts.tokenizers.target.token_bytes == target.token_bytes

    assert main(words("2_lora.yaml")) == 0
    assert bits(first, "teacher")[0] == pytest.approx(bits(second, "teacher")[-1], rel=1e-6)
    assert bits(second, "student")[0] == pytest.approx(bits(first, "student")[-1], rel=1e-6)
    # the teacher is untrained and worse than the student at its start: who learns from it gets nearer to it
    goal, course = bits(second, "teacher")[0], [*bits(first, "student"), bits(second, "student")[-1]]
    assert all(abs(goal - after) < abs(goal - before) for before, after in itertools.pairwise(course))
    adapted = load_file(second / "export" / "model.safetensors")
    assert any(not torch.equal(adapted[name], moved[name]) for name in body)

    model = AutoModelForCausalLM.from_pretrained(second / "export")
    tokenizer = AutoTokenizer.from_pretrained(second / "export")
    ids = tokenizer("The cats sat", return_tensors="pt").input_ids
    assert ids[0, 1:].tolist() == target.encode("The cats sat").ids.tolist()
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("The cats sat")


def test_the_second_stage_without_the_first_says_what_is_missing(folders, capsys):
    assert main(words("2_lora.yaml")) == 65
    assert "two_stage/embeddings/export" in capsys.readouterr().err
