"""A byte student that is fed its old tokens: trained, sharded, resumed, exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tests.training.test_resume import curve, run_in_rank
from tokenkit import parallel
from tokenkit.errors import ConfigError, ExitCode
from tokenkit.models.causal_lm import Vocabulary
from tokenkit.models.prefix import first_layers, prefix_states
from tokenkit.parallel import World
from tokenkit.training import loop
from tokenkit.training.build import build
from tokenkit.training.loop import train
from tokenkit.training.requests import Evaluate, StudentHalf
from tokenkit.training.step import prepare, train_step

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
    tokenizer = AutoTokenizer.from_pretrained(whole / "export", **load)
    ids = tokenizer("The cats sat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, two(ids).logits, rtol=0, atol=0)
    assert lines(whole)[-1]["bits_per_byte/student"] > 0


def run_and_score(world, config):
    """Train to the end; return ids of a batch, which of them count, and their nats under the live student."""
    scored, export = [], loop.hand_on

    def score_and_export(folder, config, parts, *more):
        batch = parts.heldout[0].batch
        nats = parts.run.model(Evaluate(batch))[0]
        scored.extend([batch.student.ids_BT, batch.student.trained_BT, nats])
        assert isinstance(parts.run.model, FSDPModule)
        export(folder, config, parts, *more)

    parallel.start, loop.hand_on = lambda **_: world, score_and_export
    assert loop.train(config) == ExitCode.DONE
    return scored


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_sharded_student_is_exported_whole(make_config, mode, tmp_path):
    from transformers import AutoModelForCausalLM

    untied = {"output_embeddings_mode": "untie", "optimizer__learning_rate": 0.05}
    config = make_config(**BYTES, **untied, train_model_mode=mode, batch_size=8)
    ids_BT, counts_BT, nats = run_ranks(run_and_score, 2, config)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", trust_remote_code=True)
    with torch.no_grad():
        logp = model(ids_BT).logits[:, :-1, :261].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
    got = -logp[counts_BT[:, 1:]].sum()
    torch.testing.assert_close(got, nats, rtol=1e-5, atol=0)
    before = build(make_config(**BYTES), SINGLE).student.expansion.old.weight
    assert (model.expansion.old.weight - before).abs().max() > 0.01, "the rows were not trained"


@pytest.mark.parametrize(("world_size", "die_at"), [(1, 3), (2, 5)])
def test_adapters_and_expansion_resume_to_the_same_bits(make_config, tmp_path, world_size, die_at):
    changes = {**BYTES, "steps": 6, "train_model_mode": "lora", "model_lora_dropout": 0.1}
    done = [ExitCode.DONE] * world_size
    whole = make_config(**changes, output_dir=tmp_path / "whole")
    assert run_ranks(run_in_rank, world_size, whole, None, always_shard=False) == done
    broken = make_config(**changes, output_dir=tmp_path / "broken", resume="true")
    assert KILLED in wait_ranks(start_ranks(run_in_rank, world_size, broken, die_at, always_shard=False))
    assert run_ranks(run_in_rank, world_size, broken, None, always_shard=False) == done
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == two.keys()
    assert "expansion.old.weight" in one
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def prefix_steps(world, config):
    """Run the stage; return what moved in it, its losses and the embedding."""
    torch.manual_seed(0)
    parts = build(config, world)
    before = {name: whole(p) for name, p in parts.run.model.named_parameters()}
    losses = []
    for _ in range(parts.run.main.first_step):
        losses.append(train_step(parts.run, next(parts.batches)).loss)
        parts.run.step += 1
    after = {name: whole(p) for name, p in parts.run.model.named_parameters()}
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    return moved, losses, whole(parts.student.embedding.weight)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


STAGE = {"n_prefix_layers": 1, "prefix_steps": 3, "prefix_lr": 0.01, "prefix_trainable": "embeddings"}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_prefix_stage_reads_the_expansion_and_moves_byte_rows_alone(make_config, mode):
    config = make_config(**BYTES, **STAGE, train_model_mode=mode, batch_size=8)
    parts = build(config, SINGLE)
    (batch,) = next(parts.batches)
    (prepared,) = prepare(parts.run, [batch])
    half = StudentHalf(batch, prepared, is_prefix=True)
    expanded = parts.run.model(half)["prefix"].total
    student, ids = parts.student, batch.student.ids_BT
    embedded = student.embedding(ids) + student.expansion(ids)
    got = prefix_states(student, ids, 1).hidden_BTD
    with first_layers(student, 1):
        states = student.body(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
    # the last of them is behind the final norm, which a prefix leaves out
    torch.testing.assert_close(student.body.norm(got), states.last_hidden_state)
    student.expansion = None
    assert parts.run.model(half)["prefix"].total != expanded

    moved, losses, _ = prefix_steps(SINGLE, config)
    assert len(moved) == 1, moved
    assert moved[0].startswith("student.")
    assert moved[0].endswith(".embed_tokens.weight")
    halves = make_config(**BYTES, **STAGE, train_model_mode=mode, batch_size=8, gradient_accumulation_steps=2)
    _, expected, expected_rows = prefix_steps(SINGLE, halves)
    for other, got_losses, got_rows in run_ranks(prefix_steps, 2, config):
        assert other == moved
        torch.testing.assert_close(got_losses, expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(got_rows, expected_rows, rtol=1e-3, atol=1e-4)
    assert losses == pytest.approx(expected, rel=1e-4)


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


def test_bytes_can_be_left_again(make_config, workspace, tmp_path):
    bytes_only = {**BYTES, "expand_input_ids": False, "train_model_mode": "full"}
    train(make_config(**bytes_only, steps=1, save_interval=1, output_dir=tmp_path / "there"))
    back = {
        "student__pretrained_model_name_or_path": tmp_path / "there" / "export",
        "max_length_teacher": 100,
    }
    parts = build(make_config(**back, target_tokenizer_name=workspace / "model"), SINGLE)
    new, byte_rows = parts.tokenizers.target, parts.run.model.teacher.embedding.weight
    cats = new.token_bytes.index(b" cats")
    row_D = parts.student.embedding.weight[cats]
    torch.testing.assert_close(row_D, byte_rows[list(b" cats")].mean(0))
    assert torch.equal(parts.student.embedding.weight[new.token_bytes.index(b"c")], byte_rows[ord("c")])
    assert torch.tensor(train_step(parts.run, next(parts.batches)).loss).isfinite()
