"""`tokenkit ablate`: combinations of a file's values, as a sweep of pretraining."""

import csv

import pytest
import yaml

from tests.commands.test_pretrain import PEER
from tests.tiny import TEXT, byte_level_bpe
from tokenkit.cli import door
from tokenkit.commands import sweep_runs
from tokenkit.commands.ablate import main
from tokenkit.errors import ExitCode
from tokenkit.training.loop import train


@pytest.fixture
def words(tmp_path):
    byte_level_bpe(tmp_path / "tokenizer")
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {text}" for text in TEXT * 3))
    base = {
        "model_config": PEER,
        "train_config": {"per_device_train_batch_size": 2, "max_steps": 50, "save_steps": 9, "eval_steps": 9},
        "dataset_config": {
            "datasets": [{"path": "unused"}], "tokenizer_name": str(tmp_path / "tokenizer"),
            "max_seq_length": 32, "heldout_fraction": 0.1,
        },
    }  # fmt: skip
    own = {
        "data_mixes": {
            "plain": {"name": "plain", "datasets": [{"path": str(tmp_path / "one.txt")}]},
            "both": {
                "datasets": [{"path": str(tmp_path / f"{n}.txt"), "weight": 0.5} for n in ("one", "two")]
            },
        },
        "selection_heads": {"h1_k2": {"num_heads": 1, "num_experts_per_tok": 2}},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    given = ["--base-config", str(tmp_path / "base.yaml"), "--output-dir", str(tmp_path / "out")]
    return [*given, "--custom-datasets", str(tmp_path / "own.yaml"), "--tokens", "128"]


AXES = ["--axes", "data_mix", "selection_heads"]


def test_each_combination_is_run_once_and_compared(words, tmp_path, monkeypatch, capsys):
    assert main([*words, *AXES, "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert names == ["000_plain_h1_k2", "001_both_h1_k2"]
    assert not (tmp_path / "out").exists()

    def here(planned, options):
        return max(int(train(point.config)) for point in planned.points)

    monkeypatch.setattr(sweep_runs, "run_all", here)
    assert main([*words, *AXES]) == 0
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(names)
    for row in rows.values():
        assert row["step"] == "2", "128 tokens, 64 a step"
        assert row["state"] == "done"
        assert float(row["bits_per_byte/student"]) > 0
        assert int(row["active"]) < int(row["parameters"])
        assert int(row["seconds"]) >= 0
    assert (tmp_path / "out" / "bits_per_byte.png").stat().st_size > 1000
    assert main([*words, *AXES]) == 0, "it goes on, and there is nothing to do"
    assert main([*words, "--axes", "selection_heads"]) == ExitCode.DATA
    assert "holds another sweep" in capsys.readouterr().err


def test_runs_are_started_as_those_of_a_sweep(words, tmp_path, capsys):
    more = ["--slurm", str(tmp_path / "job"), "--slurm-options", "--gres=gpu:1 --time=8:00:00", "--jobs", "2"]
    assert main([*words, *AXES, *more, "--launch", "torchrun --nproc-per-node 4"]) == 0
    lines = (tmp_path / "job" / "sweep.sbatch").read_text().splitlines()
    assert {"#SBATCH --array=0,1%2", "#SBATCH --gres=gpu:1", "#SBATCH --time=8:00:00"} <= set(lines)
    assert lines[-1].startswith("exec torchrun --nproc-per-node 4 -m tokenkit.train --config ")
    assert "2 of 2 runs to do" in capsys.readouterr().out


def test_it_is_what_others_call_run_ablations():
    assert door(["run_ablations", "--gpus", "4"])[0] == "ablate"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--axes", "data_mixes"], "did you mean data_mix?"),
        (["--axes", "data_mix", "data_mix"], "name each axis once"),
        (["--axes", "expert_setup"], "expert_setup=65k_2d"),
        (["--axes", "data_mix", "--base-config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_a_mistake_is_one_line(words, more, message, capsys, tmp_path):
    if (
        more[1] == "expert_setup"
    ):  # more keys of an expert's part than the model's k: fine; a wrong key is not
        own = {"expert_setups": {"65k_2d": {"num_expert": 3}}}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    assert main([*words, *more]) in (ExitCode.CONFIG, ExitCode.DATA)
    assert message in capsys.readouterr().err


def test_a_mix_without_data_is_refused(words, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"data_mixes": {"x": {"name": "x"}}}))
    assert main([*words, *AXES]) == ExitCode.CONFIG
    assert "data_mixes.x must hold a list datasets" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"data_mix": {}}))
    assert main([*words, *AXES]) == ExitCode.CONFIG
    assert "did you mean data_mixes?" in capsys.readouterr().err
