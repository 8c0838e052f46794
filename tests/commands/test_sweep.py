"""Sweeps: what makes an axis, what is run again, what is refused, and the table. Runs are a stand-in's."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tokenkit.cli import door, main
from tokenkit.config import TrainConfig, read_config
from tokenkit.errors import ExitCode

BASE = "--student m --target byte --data s.txt"
STUB = """
import json, sys, yaml
from pathlib import Path
config = yaml.safe_load(open(sys.argv[-1]))
folder = Path(config["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
with open("started.txt", "a") as file: file.write(folder.name + "\\n")
if Path("fails.txt").exists() and config["seed"] == 1:
    print("out of luck"); sys.exit(70)
if config["steps"] == 7: config["seed"] = float("nan")
rate = config["optimizer"]["learning_rate"]
lines = [{"step": 1, "loss": 2.0}, {"step": 2, "bits_per_byte/student": str(1 + config["seed"] + rate)
    if config["steps"] == 7 else 1 + config["seed"] + rate}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "outcome.json").write_text(json.dumps({"code": 0, "outcome": "done"}))
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    return tmp_path


def sweep(words, *more):
    return main(["sweep", *shlex.split(f"{BASE} --output out {words}"), *more])


def names(capsys, words):
    assert sweep(words, "--list") == 0
    return capsys.readouterr().out.split()


def test_commas_make_axes_and_brackets_make_lists(capsys):
    assert names(capsys, "--lr 1e-4,5e-5 losses=clm,[clm,alm_space]") == [
        "000_learning_rate-1e-4_losses-clm",
        "001_learning_rate-1e-4_losses-clm+alm_space",
        "002_learning_rate-5e-5_losses-clm",
        "003_learning_rate-5e-5_losses-clm+alm_space",
    ]
    assert len(names(capsys, "--losses clm alm_space --seed 1,2")) == 2
    assert len(names(capsys, "--model-lora-layers '\"0-3,10\",0-5'")) == 2
    assert len(names(capsys, "--loss-schedules linear(0,1,5),constant")) == 2
    assert not list(here_files())


def here_files():
    return Path("out").glob("*")


def test_the_flag_of_other_programs_opens_it():
    assert door(["cross_tokenizer_distill", "-m", "seed=1,2"]) == (
        "sweep",
        ["seed=1,2", "--config", "cross_tokenizer_distill"],
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seed 1", "no field has several values, so this is one run"),
        ("--sede 1,2", "unknown field sede (command line), did you mean seed?"),
        ("--seed 1,x", "seed=x: seed: expected an integer, got 'x'"),
        ("--seed 1,1", "seed names a value twice"),
        ("--seed 1,,2", "cannot be cut at its commas"),
        ("--seed 1,2 --jobs many", "jobs: expected an integer"),
        ("--seed 1,2 --jobs", "--jobs needs a value"),
        ("--steps 10,20 --warmup-steps 15", "steps=10: warmup_steps (15) must not exceed steps (10)"),
        ("--student /nowhere/x --seed 1,2", "/nowhere/x does not exist"),
        ("--config nothing --seed 1,2", "the configuration file nothing does not exist"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(words, message, capsys):
    assert sweep(words) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(here_files())


def test_finished_runs_stay_broken_ones_are_resumed_and_the_table_is_ordered(here, capsys):
    words = f"--seed 2,1 --lr 1e-3,1e-4 --jobs 2 --launch '{sys.executable} stub.py'"
    (here / "fails.txt").touch()
    assert sweep(words) == 70
    said = capsys.readouterr().out
    assert "002_seed-1_learning_rate-1e-3: exit code 70, out of luck" in said
    assert sorted((here / "started.txt").read_text().split()) == names(capsys, words)

    (here / "fails.txt").unlink()
    (here / "started.txt").unlink()
    assert sweep(words) == 0
    again = (here / "started.txt").read_text().split()
    assert sorted(again) == ["002_seed-1_learning_rate-1e-3", "003_seed-1_learning_rate-1e-4"]
    table = (here / "out" / "results.csv").read_text().splitlines()
    assert table[0] == "run,seed,optimizer.learning_rate,state,step,bits_per_byte/student"
    assert table[1].startswith("003_seed-1_learning_rate-1e-4,1,1e-4,done,2,2.0001")
    capsys.readouterr()
    assert main(["sweep", "--table", "out", "--metrics", "loss"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "loss"

    config = read_config(TrainConfig, [here / "out" / "points" / "002_seed-1_learning_rate-1e-3.yaml"])
    assert (config.run.resume, config.run.seed, config.optimizer.learning_rate) == (True, 1, 1e-3)
    assert config.run.output_dir == str(here / "out" / "runs" / "002_seed-1_learning_rate-1e-3")


def test_a_run_without_a_number_is_last(here, capsys):
    assert sweep(f"--steps 7,8 --launch '{sys.executable} stub.py'") == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["001_steps-8", "000_steps-7"]
    assert rows[1].split()[-1] == "nan"


def test_another_sweep_or_other_files_are_not_written_over(here, capsys):
    assert sweep("--seed 1,2", "--slurm", "job") == 0
    for words, message in (
        ("--seed 1,3", "holds another sweep, seed=1,2"),
        ("--seed 1,2 --steps 7", "holds another sweep: steps is 5000 there and 7 here"),
    ):
        assert sweep(words, "--slurm", "job") == ExitCode.DATA
        assert message in capsys.readouterr().err
    (here / "out" / "sweep.json").unlink()
    assert sweep("--seed 1,2", "--slurm", "job") == ExitCode.DATA
    assert "is not empty" in capsys.readouterr().err


def sbatch(script):
    """Run the tasks of an array as Slurm would: each in a shell of its own, elsewhere, with its number."""
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines()]
    options = dict(line.split("=", 1) for line in lines if "=" in line)
    found = {}
    for task in options["array"].split("%")[0].split(","):
        with Path(shlex.split(options["output"])[0].replace("%a", task)).open("a") as log:
            env = os.environ | {"SLURM_ARRAY_TASK_ID": task, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
            ran = subprocess.run(["bash", script], cwd="/", env=env, stdout=log, stderr=log, check=False)
        found[int(task)] = ran.returncode
    return found


def test_the_tasks_of_an_array_run_what_is_left_each_time(here, capsys):
    words = ["--slurm", "job", "--launch", f"{sys.executable} stub.py"]
    (here / "fails.txt").touch()
    assert sweep("--seed 1,2", *words) == 0
    assert sbatch(here / "job" / "sweep.sbatch") == {0: 70, 1: 0}
    assert (here / "out" / "logs" / "task_0.log").read_text() == "out of luck\n"
    (here / "fails.txt").unlink()
    assert sweep("--seed 1,2", *words) == 0
    assert sbatch(here / "job" / "sweep.sbatch") == {0: 0}
    assert (here / "started.txt").read_text().split() == ["000_seed-1", "001_seed-2", "000_seed-1"]
    assert sweep("--seed 1,2", *words) == 0
    assert "all 2 runs are done" in capsys.readouterr().out


def test_an_array_job_has_a_task_for_each_run_that_is_not_done(here, capsys):
    run = here / "out" / "runs" / "001_seed-2"
    words = ["--slurm", "job", "--slurm-options", "--gres=gpu:1 --time=1:00:00"]
    assert sweep("--seed 1,2,3", *words) == 0
    run.mkdir(parents=True)
    (run / "outcome.json").write_text(json.dumps({"code": 0, "outcome": "done"}), encoding="utf-8")
    assert sweep("--seed 1,2,3 --jobs 2", *words) == 0
    script = (here / "job" / "sweep.sbatch").read_text()
    for line in ("#SBATCH --array=0,2%2", "#SBATCH --gres=gpu:1", "#SBATCH --time=1:00:00", f"cd {here}"):
        assert line in script.splitlines()
    assert f"  {here}/out/points/000_seed-1.yaml" in script.splitlines()
    assert "2 of 3 runs to do: sbatch" in capsys.readouterr().out
    (here / "job" / "sweep.sbatch").write_text("mine\n")
    assert sweep("--seed 1,2,3", *words) == ExitCode.DATA
