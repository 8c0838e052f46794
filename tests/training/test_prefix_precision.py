"""The prefix stage in 16 bits and with recomputed activations: the same rows, by nearly the same steps."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import tiny_folder
from tests.training.test_prefix_stage import SINGLE, STAGE, four_steps
from tokenkit.training.build import build
from tokenkit.training.requests import StudentHalf
from tokenkit.training.step import prepare, train_step


def moved(before, after):
    return (before.view(torch.int32) != after.view(torch.int32)).any(1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_16_bits_move_the_same_rows_by_nearly_the_same_steps(
    make_config, tmp_path, architecture, dtype, mode
):
    folder = tiny_folder(tmp_path / "model", architecture)
    same = {**STAGE, "train_model_mode": mode, "student__pretrained_model_name_or_path": folder}
    before, exact, _, expected = four_steps(SINGLE, make_config(**same))
    start, after, still, numbers = four_steps(SINGLE, make_config(**same, dtype=dtype))
    assert still
    assert after.dtype == torch.float32
    assert torch.equal(moved(start, after), moved(before, exact))
    for got, wanted in zip(numbers[:2], expected[:2], strict=True):
        assert got[:2] == pytest.approx(wanted[:2], rel=0.05)
        assert got[2:] == wanted[2:]


def test_two_processes_in_float16_agree_with_one(make_config):
    halves = {**STAGE, "batch_size": 8, "gradient_accumulation_steps": 2, "dtype": "float16"}
    before, after, _, numbers = four_steps(SINGLE, make_config(**halves))
    for start, end, still, got in run_ranks(
        four_steps, 2, make_config(**{**halves, "gradient_accumulation_steps": 1})
    ):
        assert still
        torch.testing.assert_close(torch.tensor(got[:2]), torch.tensor(numbers[:2]), rtol=0.02, atol=1e-4)
        assert torch.equal(moved(start, end), moved(before, after))


def test_an_overflow_skips_the_step_and_halves_the_scale(make_config):
    parts = build(make_config(**{**STAGE, "prefix_steps": 3}, dtype="float16"), SINGLE)
    before = parts.run.prefix.moving[0].detach().clone()
    parts.run.loss_scale.value = 2.0**60
    report = train_step(parts.run, next(parts.batches))
    assert report.skipped
    assert parts.run.loss_scale.value == 2.0**59
    assert torch.equal(parts.run.prefix.moving[0], before)
    parts.run.loss_scale.value = 2.0**10
    report = train_step(parts.run, next(parts.batches))
    assert not report.skipped
    assert moved(before, parts.run.prefix.moving[0].detach()).any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("changes", [{}, {"dtype": "float16"}, {"train_model_mode": "full"}])
def test_recomputed_activations_change_no_number(make_config, tmp_path, architecture, changes):
    folder = tiny_folder(tmp_path / "model", architecture)
    same = {**STAGE, **changes, "student__pretrained_model_name_or_path": folder}
    stored = four_steps(SINGLE, make_config(**same))
    again = four_steps(SINGLE, make_config(**same, gradient_checkpointing="true"))
    torch.testing.assert_close(torch.tensor(again[3]), torch.tensor(stored[3]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again[1], stored[1], rtol=1e-4, atol=1e-5)
    assert again[2]


def test_the_layers_of_the_prefix_are_recomputed_and_no_others(make_config):
    parts = build(make_config(**STAGE, gradient_checkpointing="true"), SINGLE)
    calls = [0, 0]
    for number, layer in enumerate(parts.student.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    (batch,) = next(parts.batches)
    parts.run.model.train()
    (prepared,) = prepare(parts.run, [batch])
    teacher_calls = calls[0]
    parts.run.model(StudentHalf(batch, prepared, is_prefix=True))["prefix"].total.backward()
    assert calls == [teacher_calls + 2, 0]


def test_two_processes_recompute_as_one_does(make_config):
    same = {**STAGE, "batch_size": 8, "gradient_checkpointing": "true"}
    before, after, _, numbers = four_steps(SINGLE, make_config(**same, gradient_accumulation_steps=2))
    for _, end, still, got in run_ranks(four_steps, 2, make_config(**same)):
        assert still
        torch.testing.assert_close(torch.tensor(got), torch.tensor(numbers), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(end, after, rtol=1e-3, atol=1e-4)
        kept_V = (before == after).all(1)
        assert torch.equal(end[kept_V], before[kept_V])
