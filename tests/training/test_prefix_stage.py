"""The prefix stage: what moves, what stays, one process and two, and a resume within and behind it."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tests.tiny import tiny_folder, tiny_model
from tests.training.test_resume import curve, run_in_rank
from tokenkit.embeddings.rows import new_tokens
from tokenkit.errors import ConfigError, ExitCode
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.prefix import prefix_states
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.loop import train
from tokenkit.training.requests import StudentHalf
from tokenkit.training.step import prepare, train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
STAGE = {"n_prefix_layers": 1, "prefix_steps": 2, "prefix_lr": 0.01}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def four_steps(world, config):
    """Return the embedding before and after the stage, and the reports' numbers."""
    torch.manual_seed(0)
    parts = build(config, world)
    weight = parts.run.prefix.moving[0]
    before, numbers = whole(weight), []
    others = {
        name: whole(parameter)
        for name, parameter in parts.run.model.named_parameters()
        if parameter.requires_grad and parameter is not weight
    }
    for _ in range(4):
        if parts.run.step == parts.run.main.first_step:
            after = whole(weight)
            still = all(torch.equal(whole(p), others[n]) for n, p in named(parts) if n in others)
        report = train_step(parts.run, next(parts.batches))
        parts.run.step += 1
        numbers.append([report.loss, report.grad_norm, report.learning_rate, sum(report.counts.values())])
    return before, after, still, numbers


def named(parts):
    return list(parts.run.model.named_parameters())


@pytest.mark.parametrize("mode", ["full", "lora", "none"])
def test_only_rows_of_new_tokens_move_and_the_others_keep_their_bits(make_config, mode):
    config = make_config(**STAGE, train_model_mode=mode, optimizer__weight_decay=0.5)
    before, after, still, numbers = four_steps(SINGLE, config)
    parts = build(config, SINGLE)
    is_new_V = torch.zeros(len(before), dtype=torch.bool)
    is_new_V[: parts.tokenizers.target.vocab_size] = torch.from_numpy(
        new_tokens(parts.tokenizers.old, parts.tokenizers.target)
    )
    moved_V = (before.view(torch.int32) != after.view(torch.int32)).any(1)
    assert not (moved_V & ~is_new_V).any()
    assert moved_V.any()
    assert 0 < is_new_V.sum() < len(before)
    assert still, "something else than the embedding moved"
    assert [row[2] for row in numbers][:2] == [0.01, 0.005]
    assert numbers[2][2] == parts.run.main.learning_rate(0)


def test_all_rows_that_are_read_move_where_asked_for(make_config):
    before, after, _, _ = four_steps(SINGLE, make_config(**STAGE, prefix_trainable="embeddings"))
    parts = build(make_config(**STAGE), SINGLE)
    is_new_V = torch.from_numpy(new_tokens(parts.tokenizers.old, parts.tokenizers.target))
    moved_V = (before != after).any(1)[: len(is_new_V)]
    assert (moved_V & ~is_new_V).any()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_processes_and_micro_batches_agree_with_one(make_config, mode):
    before, after, _, numbers = four_steps(SINGLE, make_config(**STAGE, train_model_mode=mode, batch_size=8))
    halves = make_config(**STAGE, train_model_mode=mode, batch_size=8, gradient_accumulation_steps=2)
    for start, end, still, got in run_ranks(four_steps, 2, halves):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(numbers), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(start, before)
        torch.testing.assert_close(end, after, rtol=1e-3, atol=1e-4)
        same_V = (before == after).all(1)
        assert torch.equal(end[same_V], before[same_V])
        assert still


def test_the_stage_brings_the_hidden_states_together(make_config):
    config = make_config(**{**STAGE, "prefix_steps": 40}, steps=41)
    parts = build(config, SINGLE)
    batch = next(parts.batches)
    losses = []
    for _ in range(40):
        losses.append(train_step(parts.run, batch).loss)
        parts.run.step += 1
    assert losses[-1] < 0.5 * losses[0]


def test_lines_of_the_stage_say_so_and_hold_its_loss_alone(make_config, tmp_path):
    assert train(make_config(**STAGE)) == 0
    lines = [line for line in curve(tmp_path / "run") if "grad_norm" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("phase") for line in lines] == ["prefix", "prefix", None, None]
    for line in lines[:2]:
        assert {name for name in line if "loss" in name} == {"loss/prefix"}
    for line in lines[2:]:
        assert {name for name in line if "loss" in name} == {"loss", "loss/clm", "loss/alm_unconstrained"}
    assert train(make_config(**STAGE, dry_run="true", output_dir=tmp_path / "none")) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("world_size", "die_at"), [(1, 3), (1, 5), (2, 3)])
def test_a_resume_within_and_behind_the_stage_repeats_the_bits(make_config, tmp_path, world_size, die_at):
    stage = {**STAGE, "prefix_steps": 3, "steps": 6, "save_interval": 2, "model_lora_dropout": 0.1}
    complete = make_config(**stage, output_dir=tmp_path / "whole")
    done = [ExitCode.DONE] * world_size
    assert run_ranks(run_in_rank, world_size, complete, None, always_shard=False) == done
    broken = make_config(**stage, output_dir=tmp_path / "broken", resume="true")
    assert KILLED in wait_ranks(start_ranks(run_in_rank, world_size, broken, die_at, always_shard=False))
    assert run_ranks(run_in_rank, world_size, broken, None, always_shard=False) == done
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_prefix_is_what_the_whole_model_computes_on_its_way(tmp_path, architecture):
    model = CausalLM(
        tiny_model(architecture, num_hidden_layers=3)
        if architecture != "gpt2"
        else tiny_model(architecture, n_layer=3),
        300,
    )
    ids_BT = torch.arange(20).reshape(2, 10)
    names = [name for name, _ in model.named_parameters()]
    expected = model(ids_BT, collect=frozenset({"layers"})).layers_BTD[1]
    assert torch.equal(prefix_states(model, ids_BT, 2).hidden_BTD, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert len(model.layers) == 3
    with pytest.raises(ValueError, match=r"must lie in 1\.\.3"):
        prefix_states(model, ids_BT, 4)


def test_no_layer_above_the_prefix_runs(make_config):
    parts = build(make_config(**STAGE), SINGLE)
    for layer in parts.student.layers[1:]:
        layer.register_forward_hook(lambda *_: pytest.fail("a layer above the prefix ran"))
    (batch,) = next(parts.batches)
    (prepared,) = prepare(parts.run, [batch])
    assert parts.run.model(StudentHalf(batch, prepared, is_prefix=True))["prefix"].total > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_steps": 2}, "n_prefix_layers is 0 and prefix_steps is 2"),
        ({"n_prefix_layers": 2}, "n_prefix_layers is 2 and prefix_steps is 0"),
        ({**STAGE, "prefix_lr": 0}, "prefix_lr must be positive"),
        ({**STAGE, "prefix_steps": 4}, "leaves 0 for the main stage"),
        ({**STAGE, "prefix_steps": 2, "warmup_steps": 3}, "leaves 2 for the main stage"),
        ({**STAGE, "train_embeddings": "false"}, "train_embeddings is false"),
        ({**STAGE, "prefix_trainable": "true"}, "prefix_trainable"),
    ],
)
def test_settings_that_make_no_stage_are_refused(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_too_many_layers_another_width_and_no_new_token_are_refused(make_config, workspace, tmp_path):
    with pytest.raises(ValueError, match="n_prefix_layers is 3, but the student has 2 layers"):
        build(make_config(**{**STAGE, "n_prefix_layers": 3}), SINGLE)
    with pytest.raises(ValueError, match="every token of the target tokenizer has its row"):
        build(make_config(**STAGE, target_tokenizer_name=workspace / "model"), SINGLE)
    wide = tiny_folder(tmp_path / "wide", hidden_size=48)
    with pytest.raises(ValueError, match="32 wide and the teacher's 48"):
        build(make_config(**STAGE, teacher__pretrained_model_name_or_path=wide), SINGLE)
