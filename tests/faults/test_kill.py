"""SIGKILL at any moment loses nothing and changes nothing."""

import io
import os
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest
import torch

from tests.faults import tiny_run
from tests.faults.registry import fault
from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tokenkit import parallel
from tokenkit.run import checkpoint

ALONE = parallel.World(0, 1, torch.device("cpu"), None)
KILLS = int(os.environ.get("TOKENKIT_KILLS", "10"))


def run_with_writes_behind(world, folder):
    return tiny_run.run(world, folder, in_background=True)


def run_with_kills(folder, world_size, kills, seconds, rng):
    """Start the run again and again, kill one rank or all of them at a random moment, then let it finish."""
    landed = 0
    for _ in range(2 * kills):  # on a machine whose load changes, some kills come too late
        if landed == kills:
            break
        ranks = start_ranks(rng.choice([tiny_run.run, run_with_writes_behind]), world_size, str(folder))
        time.sleep(rng.uniform(0.1, seconds))
        for pid in ranks.pids if rng.random() < 0.5 else [rng.choice(ranks.pids)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        landed += KILLED in wait_ranks(ranks)
        shutil.rmtree(ranks.folder)
        if (folder / "final").exists():
            (folder / "final").unlink()
            shutil.rmtree(folder / "checkpoints")  # start over, so that every kill finds a run to hit
            (folder / "metrics.jsonl").unlink()
    run_ranks(tiny_run.run, world_size, str(folder))
    return landed


@fault(
    "SIGKILL of one rank or of all at random moments, saves included",
    "resumed, the curve and the weights are the unbroken run's, bit for bit",
    code="-9",
    kept="the last checkpoint",
)
def test_a_run_killed_at_random_moments_is_the_unbroken_run(tmp_path):
    """TOKENKIT_KILLS=500 makes it a night's work."""
    start = time.monotonic()
    run_ranks(tiny_run.run, 2, str(tmp_path / "whole"))
    seconds = time.monotonic() - start
    landed = run_with_kills(tmp_path / "broken", 2, KILLS, 0.8 * seconds, random.Random(0))
    assert landed >= KILLS // 2, "the kills came too late to test anything"
    for name in ("metrics.jsonl", "final"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    left = sorted(os.listdir(tmp_path / "broken/checkpoints"))
    assert left == ["step_00000009", "step_00000012"], "an interrupted save was not swept"


FILE_CALLS = [(os, name) for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")] + [
    (io, "open")
]


def die_at_call(number):
    """Kill this process just before the `number`-th call that opens, syncs, renames or deletes a file."""
    calls = [0]

    def wrap(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, counted)

    for module, name in FILE_CALLS:
        wrap(module, name)


def save_and_die(world, root, number, victim=0):
    """Commit steps 1 and 2; die in the middle of committing step 3."""
    state, rate = tiny_run.build(world)
    for step in (1, 2, 3):
        tiny_run.train_step(state, rate, world)
        if step == 3 and world.rank == victim:
            die_at_call(number)
        checkpoint.save(root, state, tiny_run.identity(), world)
    return tiny_run.digest(state)


def digest_at(step):
    state, rate = tiny_run.build(ALONE)
    for _ in range(step):
        tiny_run.train_step(state, rate, ALONE)
    return tiny_run.digest(state)


def check_survivor(root, digests):
    """The newest intact checkpoint is whole, nothing else is left, and the step can be saved after all."""
    state, rate = tiny_run.build(ALONE)
    folder = checkpoint.restore(root, state, tiny_run.identity(), ALONE)
    assert folder is not None
    assert tiny_run.digest(state) == digests[state.step]
    assert all(name.startswith("step_") for name in os.listdir(root))
    if state.step == 2:
        tiny_run.train_step(state, rate, ALONE)
        checkpoint.save(root, state, tiny_run.identity(), ALONE)
    assert tiny_run.digest(state) == digests[3]
    assert sorted(os.listdir(root))[-2:] == ["step_00000002", "step_00000003"]
    return folder.name


@fault(
    "SIGKILL before any one file operation of a save, or of the deletion behind it",
    "the old checkpoint is whole, or the new one; leftovers are swept",
    code="-9",
    kept="the last checkpoint",
)
def test_a_save_killed_before_any_of_its_file_operations_leaves_a_whole_checkpoint(tmp_path):
    digests = {step: digest_at(step) for step in (2, 3)}
    survivors = []
    for number in range(1, 200):
        root = tmp_path / str(number)
        ranks = start_ranks(save_and_die, 1, root, number, always_shard=False)
        codes = wait_ranks(ranks)
        if codes == [0]:
            break
        assert codes == [KILLED]
        survivors.append(check_survivor(root, digests))
    assert codes == [0], "the save never ran to its end"
    # most calls come before the rename that commits; the purge of step 1 comes after
    assert survivors == sorted(survivors)
    assert set(survivors) == {"step_00000002", "step_00000003"}
    assert len(survivors) > 15


@pytest.mark.parametrize("number", [1, 3, 5])
def test_the_death_of_another_rank_in_a_save_stops_all_and_leaves_a_whole_checkpoint(number, tmp_path):
    digest = run_ranks(save_and_die, 2, tmp_path / "whole", 10**6, 1)[0]
    ranks = start_ranks(save_and_die, 2, tmp_path / "run", number, 1)
    codes = wait_ranks(ranks, timeout=30)
    assert codes[1] == KILLED
    assert codes[0] not in (0, KILLED)
    folder = checkpoint.find_latest(tmp_path / "run", ALONE)
    assert folder.name == "step_00000002"
    assert run_ranks(load_and_finish, 2, tmp_path / "run") == [digest, digest]


def load_and_finish(world, root):
    state, rate = tiny_run.build(world)
    checkpoint.restore(root, state, tiny_run.identity(), world)
    tiny_run.train_step(state, rate, world)
    checkpoint.save(root, state, tiny_run.identity(), world)
    return tiny_run.digest(state)


def run_without_generators(world, folder):
    checkpoint.set_random_state = lambda saved, device: None  # in this forked process only
    return tiny_run.run(world, folder)


def test_a_resume_that_forgot_the_random_generators_would_be_noticed(tmp_path):
    whole = run_ranks(tiny_run.run, 2, str(tmp_path / "whole"))[0]
    run_ranks(tiny_run.run, 2, str(tmp_path / "broken"), 6)
    resumed = run_ranks(run_without_generators, 2, str(tmp_path / "broken"))[0]
    assert resumed[:6] == whole[:6]
    assert resumed[6:] != whole[6:]
