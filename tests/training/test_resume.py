"""Killed anywhere and resumed: the same curve, the same weights, bit for bit."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.registry import fault
from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tokenkit import parallel
from tokenkit.errors import ExitCode
from tokenkit.run.metrics import without_times
from tokenkit.training import build, loop
from tokenkit.training.reports import Reports
from tokenkit.training.step import LossScale


def run_in_rank(world, config, die_at):
    """Train inside a forked rank; SIGKILL this process once step `die_at` was reported."""
    parallel.start = lambda **_: world
    if die_at is not None:
        report = Reports.step

        def report_and_die(self, step, *args, **kwargs):
            report(self, step, *args, **kwargs)
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        Reports.step = report_and_die
    return int(loop.train(config))


def curve(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_times(line) for line in lines]


@pytest.mark.parametrize(
    ("world_size", "mode", "die_at"), [(1, "full", 5), (1, "lora", 3), (2, "full", 4), (2, "lora", 5)]
)
def test_a_killed_run_resumes_to_the_same_bits(make_config, tmp_path, world_size, mode, die_at):
    changes = {"steps": 6, "train_model_mode": mode, "model_lora_dropout": 0.1 if mode == "lora" else 0.0}
    whole = make_config(**changes, output_dir=tmp_path / "whole")
    assert run_ranks(run_in_rank, world_size, whole, None, always_shard=False) == [ExitCode.DONE] * world_size

    broken = make_config(**changes, output_dir=tmp_path / "broken", resume="true")
    codes = wait_ranks(start_ranks(run_in_rank, world_size, broken, die_at, always_shard=False))
    assert KILLED in codes
    assert (
        run_ranks(run_in_rank, world_size, broken, None, always_shard=False) == [ExitCode.DONE] * world_size
    )

    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "broken")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_run_that_died_before_its_first_checkpoint_begins_its_curve_again(
    make_config, tmp_path, monkeypatch
):
    def die(*_, **__):
        raise ArithmeticError("the run dies here")

    loop.train(make_config(output_dir=tmp_path / "whole", steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", die)
        with pytest.raises(ArithmeticError, match="dies here"):
            loop.train(make_config(output_dir=tmp_path / "broken", steps=2))
    assert {line["step"] for line in curve(tmp_path / "broken")} == {0, 1, 2}
    loop.train(make_config(output_dir=tmp_path / "broken", steps=2, resume="true"))
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_left_out_are_counted_through_a_resume(make_config, workspace, tmp_path, world_size):
    lines = (workspace / "data.jsonl").read_text().splitlines()[:30]
    talk = json.dumps({"messages": [{"role": "user", "content": "no template writes this"}]})
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join([*lines, *[talk] * 12, *['{"text": 5}'] * 3]) + "\n")
    changes = {"data.dataset_name": data, "data.num_workers": 1, "data.heldout.fraction": 0, "steps": 6}
    for name, resume, die_at in (("whole", "false", None), ("broken", "true", 5), ("broken", "true", None)):
        config = make_config(**changes, output_dir=tmp_path / name, resume=resume)
        wait_ranks(start_ranks(run_in_rank, world_size, config, die_at, always_shard=False))
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    counts = [line["rows_left_out"] for line in curve(tmp_path / "whole") if "rows_left_out" in line]
    assert len(counts) == 3, "one with each checkpoint"
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= 15


def test_a_resume_from_step_zero_evaluates_it_once(make_config, tmp_path, capfd):
    changes = {"eval_at_step_zero": "true", "save_at_step_zero": "true", "steps": 2}
    whole, broken = (make_config(**changes, output_dir=tmp_path / name) for name in ("whole", "broken"))
    assert run_ranks(run_in_rank, 1, whole, None) == [ExitCode.DONE]
    assert KILLED in wait_ranks(start_ranks(run_in_rank, 1, broken, 1))
    resumed = make_config(**changes, output_dir=tmp_path / "broken", resume="true")
    assert run_ranks(run_in_rank, 1, resumed, None) == [ExitCode.DONE]
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    first, last = [line for line in curve(tmp_path / "broken") if "heldout_bytes" in line]
    assert (first["step"], last["step"]) == (0, 2)
    measured = [f"{line['bits_per_byte/student']:.4f}" for line in (first, last)]
    assert capfd.readouterr().err.count(f"student {' -> '.join(measured)}") == 2, "said by both runs"


def stop_after_two(world, config):
    """Train, but ask this process to stop once step 2 was reported."""
    parallel.start = lambda **_: world
    report = Reports.step

    def report_and_ask(self, step, *args, **kwargs):
        report(self, step, *args, **kwargs)
        if step == 2 and world.rank == world.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Reports.step = report_and_ask
    return int(loop.train(config))


def test_a_signal_to_one_rank_saves_on_all_and_exits_with_75(make_config, tmp_path):
    config = make_config(steps=5, save_interval=5, output_dir=tmp_path / "run")
    assert run_ranks(stop_after_two, 2, config, always_shard=False) == [ExitCode.PREEMPTED] * 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "preempted"

    resumed = make_config(steps=5, save_interval=5, output_dir=tmp_path / "run", resume="true")
    assert run_ranks(run_in_rank, 2, resumed, None, always_shard=False) == [ExitCode.DONE] * 2
    assert [line["step"] for line in curve(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]


def test_the_loss_scale_is_restored(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LossScale", partial(LossScale, grow_every=1))
    loop.train(make_config(steps=2, dtype="float16"))
    seen = []
    monkeypatch.setattr(loop, "_train", lambda session: (ExitCode.DONE, str(seen.append(session.parts.run))))
    loop.train(make_config(steps=2, dtype="float16", resume="true", export_to=tmp_path / "elsewhere"))
    assert [(run.loss_scale.value, run.loss_scale.good_steps) for run in seen] == [(2.0**17, 2)]


@fault(
    "Another configuration, tokenizer or base model on `--resume`",
    "refused, with each difference",
    code=64,
    kept="everything",
)
def test_another_configuration_is_refused_with_the_difference(make_config, tmp_path):
    loop.train(make_config(steps=2, output_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.02"):
        loop.train(
            make_config(
                steps=2,
                output_dir=tmp_path / "run",
                resume="true",
                optimizer__learning_rate=0.02,
                export_to=tmp_path / "elsewhere",
            )
        )


def test_another_base_model_in_the_same_place_is_refused(make_config, workspace, tmp_path):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    changes = {"student.pretrained_model_name_or_path": model, "steps": 2, "output_dir": tmp_path / "run"}
    loop.train(make_config(**changes))
    (weights,) = model.glob("*.safetensors")
    moved = {name: tensor + 1e-3 for name, tensor in load_file(weights).items()}
    save_file(moved, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"fingerprints\.student model: .* -> "):
        loop.train(make_config(**changes, resume="true", export_to=tmp_path / "elsewhere"))
