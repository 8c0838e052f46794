"""A byte student that is fed its old tokens: trained, sharded, resumed, exported."""

import json

import pytest
import torch

from tests.ranks import run_ranks
from tokenkit.config.errors import ConfigError
from tokenkit.models.causal_lm import Vocabulary
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.loop import train
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
BYTES = {"target_tokenizer_name": "byte", "expand_input_ids": True, "max_length_new": 100}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("target", [None, "llama:target=Qwen2"])
def test_a_target_that_is_not_bytes_is_refused(make_config, target, workspace):
    name = str(workspace / "target") if target is None else target
    with pytest.raises(ConfigError, match="expand_input_ids is for students that read bytes"):
        make_config(expand_input_ids=True, target_tokenizer_name=name)


def test_the_input_is_the_byte_and_the_old_token_and_the_teacher_has_none(make_config):
    parts = build(make_config(**BYTES, train_model_mode="lora"), SINGLE)
    student, teacher, old = parts.student, parts.run.model.teacher, parts.tokenizers.old
    assert isinstance(teacher, Vocabulary)
    assert parts.tokenizers.target.encode("the cat").ids.tolist() == list(b"the cat")
    cats = old.token_bytes.index(b" cats")
    ids = torch.tensor([list(b"the cats")])
    expected_D = student.embedding.weight[ord("s")] + teacher.embedding.weight[cats]
    torch.testing.assert_close(student.embed(ids)[0, -1], expected_D)
    states = student(ids, teacher, frozenset({"embedded"}))
    torch.testing.assert_close(states.embedded_BTD, teacher.embedding(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "train_embeddings", "learns"),
    [
        ("full", True, True),
        ("full", False, False),
        ("lora", True, True),
        ("lora", False, False),
        ("none", True, True),
    ],
)
def test_old_rows_are_trained_where_the_embeddings_are(make_config, mode, train_embeddings, learns):
    config = make_config(**BYTES, train_model_mode=mode, train_embeddings=train_embeddings)
    parts = build(config, SINGLE)
    before = parts.student.expansion.old.weight.detach().clone()
    teacher = [p.detach().clone() for p in parts.run.model.teacher.parameters()]
    train_step(parts.run, next(parts.batches))
    assert torch.equal(parts.student.expansion.old.weight, before) is not learns
    assert all(map(torch.equal, parts.run.model.teacher.parameters(), teacher))


def three_steps(world, config):
    torch.manual_seed(0)
    parts = build(config, world)
    reports = [train_step(parts.run, next(parts.batches)) for _ in range(3)]
    return [[*report.losses.values(), report.grad_norm] for report in reports]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_processes_agree_with_one(make_config, mode):
    config = make_config(**BYTES, train_model_mode=mode, output_embeddings_mode="untie")
    expected = torch.tensor(three_steps(SINGLE, config))
    assert expected.isfinite().all()
    for result in run_ranks(three_steps, 2, config):
        torch.testing.assert_close(torch.tensor(result), expected, rtol=2e-5, atol=1e-6)


def test_a_run_is_resumed_and_exported(make_config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_config(**BYTES, train_model_mode="full", output_dir=whole))
    settings = {**BYTES, "train_model_mode": "full", "output_dir": cut}
    train(make_config(**settings))
    (cut / "checkpoints" / "step_00000004").rename(tmp_path / "last")
    (cut / "export").rename(tmp_path / "away")
    train(make_config(**settings, resume=True))
    load = {"trust_remote_code": True}
    one = AutoModelForCausalLM.from_pretrained(whole / "export", **load)
    two = AutoModelForCausalLM.from_pretrained(cut / "export", **load)
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    ids = tokenizer("The cats sat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, two(ids).logits, rtol=0, atol=0)
    assert lines(whole)[-1]["bits_per_byte/student"] > 0


@pytest.mark.parametrize("expand", [True, False])
def test_latents_and_a_head_of_its_own(make_config, expand, tmp_path):
    losses = ["clm", "alm_unconstrained", "alm_latents"]
    more = {"losses": losses, "output_embeddings_mode": "untie", "train_model_mode": "full"}
    train(make_config(**{**BYTES, "expand_input_ids": expand}, **more, eval_at_step_zero=True))
    measured = [line["bits_per_byte/student"] for line in lines(tmp_path / "run") if "heldout_bytes" in line]
    assert measured[-1] < measured[0]
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert ("auto_map" in config) is expand
