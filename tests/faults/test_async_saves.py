"""Checkpoints that are written while steps are taken: as whole as others, never missed in silence."""

import json
import os
import signal
import threading

import pytest
import torch

from tests.faults import tiny_run
from tests.faults.registry import fault
from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tokenkit import cli, parallel
from tokenkit.errors import CheckpointError, NonFiniteError, OtherRankError
from tokenkit.run import checkpoint, saving
from tokenkit.run.ending import read_outcome
from tokenkit.run.saving import Background
from tokenkit.training import loop
from tokenkit.training.reports import Reports

ALONE = parallel.World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def gate(monkeypatch):
    """Hold every write back until it is set."""
    opened, write = threading.Event(), saving.write

    def wait_and_write(*args):
        assert opened.wait(60)
        return write(*args)

    monkeypatch.setattr(saving, "write", wait_and_write)
    return opened


def at_step(monkeypatch, number, do):
    """Call `do` once step `number` was reported."""
    report = Reports.step

    def report_and_do(self, step, *args, **kwargs):
        report(self, step, *args, **kwargs)
        if step == number:
            do()

    monkeypatch.setattr(Reports, "step", report_and_do)


def saved(folder):
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_the_next_steps_are_taken_meanwhile(make_config, tmp_path, monkeypatch, gate):
    """Held back until a step later was taken, it is whole; so is the last, before the export."""
    at_step(monkeypatch, 3, gate.set)
    assert loop.train(make_config(losses=["clm"], async_save="true", steps=4, save_interval=2)) == 0
    assert saved(tmp_path) == ["step_00000002", "step_00000004"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "save_seconds" in line] == [3]
    assert checkpoint.find_latest(tmp_path / "run" / "checkpoints", ALONE).name == "step_00000004"


def test_as_many_are_kept_as_were_asked_for(make_config, tmp_path):
    changes = {"losses": ["clm"], "async_save": "true", "steps": 5, "save_interval": 1}
    assert loop.train(make_config(**changes, save_total_limit=3)) == 0
    assert saved(tmp_path) == ["step_00000003", "step_00000004", "step_00000005"]


def save_then_step(world, root):
    """Begin to save, take a step, wait: return what the state was when the save began."""
    state, rate = tiny_run.build(world)
    background = Background(world, 60.0)
    for _ in range(2):
        tiny_run.train_step(state, rate, world)
    before = tiny_run.digest(state)
    background.begin(root, state, tiny_run.identity(), 2)
    tiny_run.train_step(state, rate, world)
    torch.rand(3)
    background.finish()
    assert tiny_run.digest(state) != before
    fresh, _ = tiny_run.build(world)
    checkpoint.restore(root, fresh, tiny_run.identity(), world)
    assert (fresh.step, fresh.extra) == (2, {"position": 2})
    return tiny_run.digest(fresh) == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_written_is_what_was_there_before_the_next_step(world_size, tmp_path):
    assert run_ranks(save_then_step, world_size, tmp_path) == [True] * world_size


def test_a_copy_shares_no_memory_with_what_moves():
    state, rate = tiny_run.build(ALONE)
    tiny_run.train_step(state, rate, ALONE)
    copies = saving.Snapshot.of(state, ALONE, copied=True).tensors
    moving = saving.Snapshot.of(state, ALONE, copied=False).tensors
    assert copies.keys() == moving.keys()
    assert all(torch.equal(copies[name], moving[name]) for name in copies)
    assert all(copies[name].data_ptr() != moving[name].data_ptr() for name in copies)


def wait_for_the_write(patch):
    """Let step 5 end only when what is written behind it has come to its end."""
    run, ended = Background._run, threading.Event()
    patch(Background, "_run", lambda self, job: (run(self, job), ended.set() if self.has_failed else None))
    report = Reports.step

    def report_and_wait(self, step, *args, **kwargs):
        report(self, step, *args, **kwargs)
        assert step != 5 or ended.wait(60)

    patch(Reports, "step", report_and_wait)


@fault(
    "A checkpoint that is written while training goes on (`async_save`) cannot be written, on one rank",
    "every rank ends before its next step, with the words of a save that training waits for",
    code=74,
    kept="the last checkpoint",
)
def test_a_failed_write_ends_the_run_at_the_next_step(make_config, tmp_path):
    config = make_config(losses=["clm"], async_save="true", steps=9, save_interval=4, eval_interval=9)
    codes = wait_ranks(start_ranks(train_on_a_disk_that_fills, 2, config, always_shard=False))
    assert codes == [74, 74]
    outcome = read_outcome(tmp_path / "run")
    assert (outcome["code"], outcome["outcome"]) == (74, "disk")
    assert outcome["step"] in (4, 5)
    assert "rank 1 could not save" in outcome["reason"]
    assert "No space left on device" in outcome["reason"]
    assert saved(tmp_path) == []


def train_on_a_disk_that_fills(world, config):
    """Rank 1 has no room for its part of the checkpoint of step 4."""
    parallel.start = lambda **_: world
    wait_for_the_write(setattr)
    write = saving.write_durably

    def be_full(path, *args):
        if world.rank == 1 and "step_00000004" in str(path):
            raise OSError(28, os.strerror(28), str(path))
        write(path, *args)

    saving.write_durably = be_full
    try:
        loop.train(config)
    except (OSError, OtherRankError) as error:
        raise SystemExit(cli.exit_code(error)) from error


def test_one_process_hears_of_it_too(make_config, tmp_path, monkeypatch):
    def fail(*_):
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr(saving, "write", fail)
    wait_for_the_write(monkeypatch.setattr)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        loop.train(make_config(losses=["clm"], async_save="true", steps=9, save_interval=4))
    assert read_outcome(tmp_path / "run")["step"] in (4, 5)


@fault(
    "A signal while a checkpoint is written behind training (`async_save`)",
    "it is committed first, then that of the last step",
    code=75,
    kept="every step",
)
def test_a_signal_waits_for_what_is_being_written(make_config, tmp_path, monkeypatch, gate):
    at_step(monkeypatch, 3, lambda: (os.kill(os.getpid(), signal.SIGTERM), gate.set()))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # also under nohup
    try:
        assert loop.train(make_config(losses=["clm"], async_save="true", steps=9, save_interval=2)) == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_run_that_ends_with_an_error_lets_the_write_finish(make_config, tmp_path, monkeypatch, gate):
    def diverge():
        gate.set()
        raise NonFiniteError("loss clm is not finite")

    at_step(monkeypatch, 3, diverge)
    with pytest.raises(NonFiniteError):
        loop.train(make_config(losses=["clm"], async_save="true", steps=9, save_interval=2))
    assert saved(tmp_path) == ["step_00000002"]
    assert read_outcome(tmp_path / "run")["code"] == 70


def save_behind_and_die(world, root, number, victim):
    """Commit step 1; rank `victim` dies within the writing of step 2, while step 3 is taken."""
    from tests.faults.test_kill import die_at_call

    state, rate = tiny_run.build(world)
    background = Background(world, 30.0)
    for step in (1, 2):
        tiny_run.train_step(state, rate, world)
        background.finish()
        if step == 2 and world.rank == victim:
            die_at_call(number)
        background.begin(root, state, tiny_run.identity(), 2)
    tiny_run.train_step(state, rate, world)
    background.finish()


@fault(
    "A rank is killed while a checkpoint is written behind training (`async_save`)",
    "what was not committed is swept by the next start",
    code="-9, 1",
    kept="the last checkpoint",
)
@pytest.mark.parametrize(("world_size", "number", "victim"), [(1, 4, 0), (1, 9, 0), (2, 3, 1), (2, 6, 0)])
def test_death_in_the_middle_leaves_a_whole_checkpoint(world_size, number, victim, tmp_path):
    codes = wait_ranks(start_ranks(save_behind_and_die, world_size, tmp_path, number, victim), timeout=45)
    assert codes[victim] == KILLED
    state, _ = tiny_run.build(ALONE)
    found = checkpoint.restore(tmp_path, state, tiny_run.identity(), ALONE)
    assert found.name == "step_00000001"
    expected, rate = tiny_run.build(ALONE)
    if world_size == 1:
        tiny_run.train_step(expected, rate, ALONE)
        assert tiny_run.digest(state) == tiny_run.digest(expected)
    assert os.listdir(tmp_path) == ["step_00000001"]
