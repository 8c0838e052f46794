"""The tables of experts over 1, 2 and 4 processes: cut by columns, the same losses, gradients and weights.

Faults tried, each caught here: tables that FSDP2 shards as well; a row's second moment over a rank's own
columns; usage of one rank alone.
"""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tests.commands.test_pretrain import PEER
from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tests.tiny import byte_level_bpe
from tokenkit import parallel
from tokenkit.commands.pretrain import main as pretrain
from tokenkit.config import TrainConfig, read_config
from tokenkit.errors import ConfigError
from tokenkit.parallel import World
from tokenkit.run.metrics import without_times
from tokenkit.training.build import build
from tokenkit.training.reports import Reports
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def config_of(tmp_path, workspace):
    byte_level_bpe(tmp_path / "tokenizer")

    def make(peer=(), **changes):
        model = {"model_type": "peer_mla", **PEER, "peer_config": {**PEER["peer_config"], **dict(peer)}}
        settings = {
            "student.pretrained_model_name_or_path": "a new one", "student.from_config": model,
            "student.tokenizer_name": str(tmp_path / "tokenizer"), "losses": ["clm"],
            "train_model_mode": "full", "max_length_new": 48, "max_length_teacher": 48, "batch_size": 8,
            "steps": 4, "save_interval": 2, "optimizer.learning_rate": 0.01, "data.num_workers": 0,
            "data.dataset_name": str(workspace / "data.jsonl"), "data.heldout.fraction": 0.1,
            "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        return read_config(TrainConfig, (), settings | changes, say=lambda line: None)

    return make


def first_steps(world, configs, number=2):
    """Return of each configuration losses and norms by step, and the whole tables at the end."""
    found = []
    for config in configs:
        torch.manual_seed(0)
        parts = build(config, world)
        curve = []
        for _ in range(number):
            report = train_step(parts.run, next(parts.batches))
            curve.append([float(report.loss), float(report.grad_norm)])
            parts.run.step += 1
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in tables(parts)]
        found.append((torch.tensor(curve), torch.stack([p.detach() for p in whole])))
    return found


def tables(parts):
    named = parts.run.model.named_parameters()
    return [parameter for name, parameter in named if name.endswith((".experts.down", ".experts.up"))]


def test_1_2_and_4_processes_agree_under_every_optimizer(config_of):
    ways = [{}, {"optimizer": "rowwise_adam", "expert_lr": 0.05}, {"optimizer": "rowwise_adagrad"}]
    configs = [config_of(peer=way) for way in ways] + [config_of(gradient_checkpointing=True)]
    one = first_steps(SINGLE, configs)
    for ranks in (2, 4):
        for rank in run_ranks(first_steps, ranks, configs):
            for (curve, whole), (got, found) in zip(one, rank, strict=True):
                torch.testing.assert_close(got, curve, rtol=1e-5, atol=0)
                # Adam divides gradients of rounding's size by their own root
                assert (found - whole).norm() < 1e-3 * whole.norm()


def placements(world, configs):
    def of(config):
        return [(str(p.placements[0]), list(p.to_local().shape)) for p in tables(build(config, world))]

    return [of(config) for config in configs]


def refused(world, config):
    with pytest.raises(ConfigError, match="the 32 columns of the experts' tables over 3 processes"):
        build(config, world)
    return True


def test_columns_where_they_divide_and_rows_by_fsdp2_elsewhere(config_of):
    """64 experts of 32 columns over 3 ranks, which do not divide, and over 2."""
    kinds = ("auto", "gathered", "columns")
    configs = {kind: config_of(peer={"sharding": kind}, batch_size=6) for kind in kinds}
    columns, rows = [["S(2)", [64, 1, 16]]] * 2, [["S(0)", [32, 1, 32]]] * 2
    found = run_ranks(placements, 2, list(configs.values()))[0]
    assert [[list(pair) for pair in one] for one in found] == [columns, rows, columns]
    found = run_ranks(placements, 3, [configs["auto"]])[0]
    assert {name for name, _ in found[0]} == {"S(0)"}
    assert run_ranks(refused, 3, configs["columns"]) == [True] * 3


def pretrained(world, folder, output, rows, more):
    """Be `tokenkit pretrain` in this rank, with packed rows, usage and row-wise states."""
    parallel.start = lambda **_: world
    peer = {"log_expert_usage": True, "log_freq": 2, "optimizer": "rowwise_adam", "expert_lr": 0.02}
    model = {**PEER, "peer_config": {**PEER["peer_config"], **peer}}
    words = {
        "model-config": json.dumps(model), "train-config.output-dir": f"{folder}/{output}",
        "train-config.max-steps": 4, "train-config.per-device-train-batch-size": rows,
        "train-config.learning-rate": 0.01, "train-config.save-steps": 2, "train-config.logging-steps": 1,
        "dataset-config.datasets": json.dumps([{"path": f"{folder}/data.jsonl"}]),
        "dataset-config.tokenizer-name": f"{folder}/tokenizer", "dataset-config.max-seq-length": 48,
        "dataset-config.heldout-fraction": 0.1,
    }  # fmt: skip
    if "die_at" in more:
        report = Reports.step

        def report_and_die(self, step, *args, **kwargs):
            report(self, step, *args, **kwargs)
            if step == more["die_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

        Reports.step = report_and_die
    resume = ["--train-config.resume-from-checkpoint", "true"] if "resume" in more else []
    return int(pretrain([*(word for k, v in words.items() for word in (f"--{k}", str(v))), *resume]))


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_times(line) for line in found]


def test_pretrain_over_two_processes_counts_resumes_and_goes_on_with_one(tmp_path, workspace):
    """9 s of a CPU, four small runs: packing, usage, states and export meet several ranks nowhere else."""
    byte_level_bpe(tmp_path / "tokenizer")
    shutil.copy(workspace / "data.jsonl", tmp_path)

    def run(ranks, output, **more):
        started = start_ranks(pretrained, ranks, tmp_path, output, 4 // ranks, more, always_shard=False)
        return wait_ranks(started)

    assert run(2, "two") == [0, 0]
    assert KILLED in run(2, "broken", die_at=3)
    shutil.copytree(tmp_path / "broken", tmp_path / "fewer")
    assert run(2, "broken", resume=True) == [0, 0]
    assert run(1, "fewer", resume=True) == [0]

    assert lines(tmp_path / "broken") == lines(tmp_path / "two")
    weights = {
        name: load_file(tmp_path / name / "export" / "model.safetensors")
        for name in ("two", "broken", "fewer")
    }
    for name, tensor in weights["two"].items():
        assert torch.equal(weights["broken"][name], tensor), name
        assert (weights["fewer"][name] - tensor).norm() <= 5e-3 * tensor.norm(), name
    losses = {
        name: torch.tensor([line["loss"] for line in lines(tmp_path / name) if "loss" in line])
        for name in weights
    }
    torch.testing.assert_close(losses["fewer"], losses["two"], rtol=1e-4, atol=0)
    for name in ("two", "fewer"):
        stats = json.loads((tmp_path / name / "checkpoints" / "expert_stats_00000004.json").read_text())
        assert stats["layers"]["1"]["uses"] == 2 * 4 * 48 * 2 * 2, "steps, rows, tokens, heads, picks"
