"""The prefix stage with `prefix_trainable: all`: rows and first layers move, and nothing above."""

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tests.training.test_prefix_stage import SINGLE, STAGE, whole
from tests.training.test_resume import curve, run_in_rank
from tokenkit.errors import ConfigError, ExitCode
from tokenkit.training.build import build
from tokenkit.training.step import train_step

ALL = {**STAGE, "prefix_trainable": "all"}


def two_steps(world, config):
    """Return every parameter before and after the stage, whether it is trained, and the stage's numbers."""
    torch.manual_seed(0)
    parts = build(config, world)
    named = dict(parts.run.model.named_parameters())
    before, numbers = {name: whole(parameter) for name, parameter in named.items()}, []
    for _ in range(2):
        report = train_step(parts.run, next(parts.batches))
        parts.run.step += 1
        numbers.append([report.loss, report.grad_norm])
    named = dict(parts.run.model.named_parameters())
    after = {name: whole(parameter) for name, parameter in named.items()}
    return before, after, {name: p.requires_grad for name, p in named.items()}, numbers


@pytest.mark.parametrize("changes", [{}, {"dtype": "float16"}, {"gradient_checkpointing": "true"}])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_rows_and_first_layers_move_and_nothing_else(make_config, mode, changes):
    config = make_config(**ALL, **changes, train_model_mode=mode, optimizer__weight_decay=0.5)
    before, after, is_trained, numbers = two_steps(SINGLE, config)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {n for n in before if is_trained[n] and ("embed_tokens" in n or ".layers.0." in n)}
    assert moved <= expected
    assert {n for n in expected if "lora_A" not in n} <= moved, "A has no gradient while B is 0, for a step"
    assert any(".layers.0." in name for name in moved)
    if changes:
        expected = two_steps(SINGLE, make_config(**ALL, train_model_mode=mode))[3]
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected), rtol=0.05, atol=0)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_processes_agree_with_one(make_config, mode):
    _, after, _, numbers = two_steps(SINGLE, make_config(**ALL, train_model_mode=mode, batch_size=8))
    halves = make_config(**ALL, train_model_mode=mode, batch_size=8, gradient_accumulation_steps=2)
    for _, end, _, got in run_ranks(two_steps, 2, halves):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(numbers), rtol=1e-4, atol=1e-6)
        for name in after:
            torch.testing.assert_close(end[name], after[name], rtol=1e-3, atol=1e-3)


def test_a_resume_within_the_stage_repeats_the_bits(make_config, tmp_path):
    stage = {**ALL, "prefix_steps": 3, "steps": 5, "save_interval": 2}
    complete = make_config(**stage, output_dir=tmp_path / "whole")
    assert run_ranks(run_in_rank, 1, complete, None, always_shard=False) == [ExitCode.DONE]
    broken = make_config(**stage, output_dir=tmp_path / "broken", resume="true")
    assert KILLED in wait_ranks(start_ranks(run_in_rank, 1, broken, 2, always_shard=False))
    assert KILLED in wait_ranks(start_ranks(run_in_rank, 1, broken, 3, always_shard=False))
    assert run_ranks(run_in_rank, 1, broken, None, always_shard=False) == [ExitCode.DONE]
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_layers_that_are_not_trained_cannot_move(make_config):
    with pytest.raises(ConfigError, match="train_model_mode none trains no layer"):
        make_config(**ALL, train_model_mode="none")
    with pytest.raises(ValueError, match="nothing is trained in the first 1 layers"):
        build(make_config(**ALL, model_lora_layers="1"), SINGLE)
