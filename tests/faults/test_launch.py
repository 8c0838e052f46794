"""`python -m tokenkit.launch`: the run's own exit code, signals passed on, new starts that end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.registry import fault
from tokenkit.launch import main

ROOT = Path(__file__).parents[2]
SAYS = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
starts = folder / "starts"; number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
code, step = eval(sys.argv[2])[number]
if step is not None:
    (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
if code is not None:
    (folder / "outcome.json").write_text(json.dumps({"code": code}))
sys.exit(0 if code == 0 else 1)
"""


def launched(folder, ends, restarts=0):
    """Launch a command that ends so: the code that outcome.json names, the checkpoint that it left."""
    command = [sys.executable, "-c", SAYS, str(folder), repr(ends), "--resume"]
    code = main([str(folder), "--restarts", str(restarts), "--", *command])
    starts = folder / "starts"
    return code, len(starts.read_text()) if starts.exists() else 0


@pytest.mark.parametrize("code", [0, 64, 70, 74, 75])
def test_the_code_is_the_runs_own_and_such_an_end_is_no_reason_to_start_again(code, tmp_path):
    assert launched(tmp_path, [(code, None)], restarts=2) == (code, 1)


def test_words_of_an_earlier_run_are_not_those_of_this_one(tmp_path):
    (tmp_path / "outcome.json").write_text(json.dumps({"code": 75}))
    assert launched(tmp_path, [(None, None)]) == (1, 1)


def test_a_crash_is_started_again_until_it_is_done(tmp_path):
    assert launched(tmp_path, [(1, 1), (69, 2), (1, 3), (0, 4)], restarts=5) == (0, 4)
    assert launched(tmp_path / "other", [(1, 1), (1, 2)], restarts=1) == (1, 2)


def test_what_is_refused_before_there_is_a_folder_is_not_started_again(tmp_path, capfd):
    train = f"{sys.executable} -m tokenkit.train --output {tmp_path / 'out'} --losses clmm || exit 1"
    command = ["sh", "-c", train, "sh", "--resume"]  # 1, as torchrun
    assert main([str(tmp_path / "out"), "--restarts", "2", "--", *command]) == 64
    assert "starting again" not in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: output"),
        (["out", "--restarts", "x", "--", "true"], "argument --restarts: invalid int value: 'x'"),
        (["out"], "write the command behind --"),
    ],
)
def test_a_mistake_is_one_line(words, says, capsys):
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr().err
    assert code == 64
    assert told.startswith("tokenkit: ")
    assert says in told
    assert told.count("\n") == 1


@fault(
    "A run that crashes at the same step each time, under `python -m tokenkit.launch --restarts N`",
    "after three starts without a new checkpoint there is no other",
    code=70,
    kept="the last checkpoint",
)
def test_starts_that_come_no_further_end(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("tokenkit.launch._WAIT_SECONDS", 0)
    assert launched(tmp_path, [(1, 4)] * 9, restarts=9) == (70, 4)
    assert "3 starts in a row came no further than the checkpoint of step 4" in capfd.readouterr().err


@fault(
    "Preempted by Slurm or Kubernetes: SIGUSR1 or SIGTERM to `python -m tokenkit.launch`",
    "passed on; the run saves, and its 75 is what the scheduler sees",
    code=75,
    kept="every step",
)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_passed_on_and_ends_the_starts(number, tmp_path):
    hears = (
        "import json, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (open(sys.argv[1], 'w').write(json.dumps({{'code': 75}})), "
        "sys.exit(1)))\nprint('begun', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", hears, str(tmp_path / "outcome.json"), "--resume"]
    door = [sys.executable, "-m", "tokenkit.launch", str(tmp_path), "--restarts", "3", "--", *command]
    process = subprocess.Popen(door, stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    assert process.wait(30) == 75


@fault(
    "A node is cut off: its torchrun waits long after its rank has ended",
    "`python -m tokenkit.launch` ends it two minutes later (`--linger`), with the run's code",
    code="the run's own",
    kept="the last checkpoint",
)
def test_a_command_that_outlives_the_run_is_ended(tmp_path, capfd):
    stays = (
        "import json, sys, time\n"
        "open(sys.argv[1], 'w').write(json.dumps({'code': 1, 'outcome': 'fault'}))\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", stays, str(tmp_path / "outcome.json")]
    assert main([str(tmp_path), "--linger", "0", "--", *command]) == 1
    assert "the run has ended and" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "write the command behind --"),
        (["run", "--restarts", "-1", "--", "x", "--resume"], "--restarts must be at least 0, got -1"),
        (["run", "--linger", "-1", "--", "x"], "--linger must be at least 0, got -1"),
        (["run", "--restarts", "1", "--", "x"], "--restarts needs --resume in the command"),
        (["run", "--", "/nowhere/at-all"], "/nowhere/at-all could not be started: No such file"),
    ],
)
def test_what_cannot_be_launched_is_one_line(words, said, capfd):
    assert main(words) == 64
    assert said in capfd.readouterr().err
