"""What a checkpoint gives back, to whom, and what it refuses."""

import json
import os
import random
import resource

import numpy as np
import pytest
import torch
from torch import nn

from tests.faults import tiny_run
from tests.faults.registry import fault
from tests.ranks import run_ranks
from tokenkit import parallel
from tokenkit.errors import CheckpointError
from tokenkit.run import checkpoint, safe_dcp, saving
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.state import saved_tensors

ALONE = parallel.World(0, 1, torch.device("cpu"), None)


def small_state(step=0, width=4):
    torch.manual_seed(step)
    module = nn.Linear(width, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return State(module, optimizer, step, {"position": step})


def save_steps(root, *steps, **options):
    for step in steps:
        checkpoint.save(root, small_state(step), Identity({"lr": 1}), ALONE, **options)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(world_size, tmp_path):
    whole = run_ranks(tiny_run.run, world_size, str(tmp_path / "whole"))[0]
    run_ranks(tiny_run.run, world_size, str(tmp_path / "broken"), 6)
    resumed = run_ranks(tiny_run.run, world_size, str(tmp_path / "broken"))[0]
    assert len(whole) == tiny_run.STEPS
    assert resumed == whole
    assert (tmp_path / "broken/final").read_text() == (tmp_path / "whole/final").read_text()


def save_one(world, root, always_eval):
    state, rate = tiny_run.build(world)
    for _ in range(2):
        tiny_run.train_step(state, rate, world)
    if always_eval:
        with torch.no_grad():
            state.module.eval()(torch.zeros(2, 3, dtype=torch.long))
    folder = checkpoint.save(root, state, tiny_run.identity(), world)
    return tiny_run.digest(state), str(folder)


def load_one(world, root):
    state, _ = tiny_run.build(world)
    checkpoint.restore(root, state, tiny_run.identity(), world)
    assert (state.step, state.extra) == (2, {"position": 2})
    return tiny_run.digest(state)


@fault(
    "Another number of ranks on `--resume` (1, 2, 4)",
    "the same parameters, moments and data; losses to float32 rounding",
    code="-",
    kept="everything",
)
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 2), (2, 4), (4, 1)])
def test_other_numbers_of_ranks_load_the_same_parameters_and_moments(saved_by, loaded_by, tmp_path):
    digest, _ = run_ranks(save_one, saved_by, tmp_path, saved_by == 2)[0]
    assert set(run_ranks(load_one, loaded_by, tmp_path)) == {digest}


def test_a_plain_process_loads_what_ranks_saved(tmp_path):
    digest, _ = run_ranks(save_one, 2, tmp_path, False)[0]
    assert load_one(ALONE, tmp_path) == digest


def different_extra(world, root):
    state, _ = tiny_run.build(world)
    state.extra = {"position": world.rank}
    checkpoint.save(root, state, tiny_run.identity(), world)
    state.extra = None
    checkpoint.restore(root, state, tiny_run.identity(), world)
    return state.extra["position"]


def test_each_rank_gets_its_own_position_back_and_other_ranks_none(tmp_path):
    assert run_ranks(different_extra, 2, tmp_path) == [0, 1]
    with pytest.raises(CheckpointError, match="2 ranks, and this run has 1: start as many processes"):
        checkpoint.restore(tmp_path, tiny_run.build(ALONE)[0], tiny_run.identity(), ALONE)


def test_tied_weights_stay_tied_and_frozen_ones_are_left_out(tmp_path):
    state, _ = tiny_run.build(ALONE)
    names = saved_tensors(state.module).keys()
    assert "embedding.weight" in names
    assert "head.weight" not in names
    assert "blocks.0.base.weight" not in names
    assert {"blocks.0.up.bias", "batches"} <= names
    checkpoint.save(tmp_path, state, tiny_run.identity(), ALONE)
    other, _ = tiny_run.build(ALONE)
    nn.init.zeros_(other.module.embedding.weight)
    checkpoint.restore(tmp_path, other, tiny_run.identity(), ALONE)
    assert other.module.head.weight is other.module.embedding.weight
    assert torch.equal(other.module.head.weight, state.module.head.weight)


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    state, rate = tiny_run.build(ALONE)
    checkpoint.save(tmp_path, state, tiny_run.identity(), ALONE)
    assert not state.optimizer.state
    first = tiny_run.train_step(state, rate, ALONE)
    other, _ = tiny_run.build(ALONE)
    assert tiny_run.train_step(other, rate, ALONE) == first
    assert tiny_run.digest(other) == tiny_run.digest(state)


def test_every_global_generator_continues(tmp_path):
    checkpoint.save(tmp_path, small_state(1), Identity({}), ALONE)
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand())
    checkpoint.restore(tmp_path, small_state(), Identity({}), ALONE)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected


def test_rates_and_decays_are_those_of_the_configuration_not_of_the_checkpoint(tmp_path):
    state = small_state(1)
    state.module(torch.ones(1, 4)).sum().backward()
    state.optimizer.step()
    checkpoint.save(tmp_path, state, Identity({}), ALONE)
    other = small_state()
    other.optimizer.param_groups[0]["weight_decay"] = 0.5
    checkpoint.restore(tmp_path, other, Identity({}), ALONE)
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.5
    for key, value in state.optimizer.state[state.module.weight].items():
        assert torch.equal(value, other.optimizer.state[other.module.weight][key])


def test_the_newest_are_kept_and_the_rest_is_deleted(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 10)
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000010"]
    save_steps(tmp_path, 11, 12, keep_last=3)
    assert sorted(os.listdir(tmp_path)) == ["step_00000010", "step_00000011", "step_00000012"]
    assert checkpoint.find_latest(tmp_path, ALONE).name == "step_00000012"


def test_keeping_one_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be at least 2"):
        save_steps(tmp_path, 1, keep_last=1)


@fault(
    "The step that is to be saved is there already",
    "refused; nothing is written into it",
    code=65,
    kept="everything",
)
def test_a_step_that_is_there_is_never_overwritten(tmp_path):
    save_steps(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "step_00000001").iterdir()}
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_steps(tmp_path, 1)
    assert {p.name: p.read_bytes() for p in (tmp_path / "step_00000001").iterdir()} == before
    assert os.listdir(tmp_path) == ["step_00000001"]


@fault(
    "A link among the checkpoints when old ones are deleted",
    "left alone, with what it points to",
    code="-",
    kept="everything",
)
def test_purging_leaves_links_and_what_they_point_to_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    save_steps(elsewhere, 1)
    root = tmp_path / "run"
    root.mkdir()
    (root / "step_00000001").symlink_to(elsewhere / "step_00000001")
    save_steps(root, 2, 3, 4)
    assert (root / "step_00000001").is_symlink()
    assert checkpoint.find_latest(elsewhere, ALONE).name == "step_00000001"


def test_no_checkpoint_yet_is_no_error(tmp_path):
    state = small_state()
    assert checkpoint.restore(tmp_path / "none", state, Identity({}), ALONE) is None
    assert state.step == 0


CHANGES = [
    ({"optimizer": {"lr": 2, "decay": 0.1}, "losses": ["alm"]}, "optimizer.lr: 1 -> 2"),
    ({"optimizer": {"lr": 1}, "losses": ["alm"]}, "optimizer.decay: 0.1 -> absent"),
    ({"optimizer": {"lr": 1, "decay": 0.1, "b": 0}, "losses": ["alm"]}, "optimizer.b: absent -> 0"),
    (
        {"optimizer": {"lr": 1, "decay": 0.1}, "losses": ["alm", "clm"]},
        r'losses: \["alm"\] -> \["alm", "clm"\]',
    ),
]


@pytest.mark.parametrize(("config", "line"), CHANGES)
def test_another_configuration_is_refused_with_the_difference(config, line, tmp_path):
    saved = {"optimizer": {"lr": 1, "decay": 0.1}, "losses": ("alm",)}
    checkpoint.save(tmp_path, small_state(1), Identity(saved), ALONE)
    with pytest.raises(ValueError, match=f"another configuration.*\n  {line}\n"):
        checkpoint.restore(tmp_path, small_state(), Identity(config), ALONE)
    state = small_state()
    checkpoint.restore(tmp_path, state, Identity(config), ALONE, may_differ=("optimizer", "losses"))
    assert state.step == 1


def test_another_tokenizer_is_refused(tmp_path):
    checkpoint.save(tmp_path, small_state(1), Identity({}, {"tokenizer": "aa"}), ALONE)
    with pytest.raises(ValueError, match=r'fingerprints.tokenizer: "aa" -> "bb"'):
        checkpoint.restore(tmp_path, small_state(), Identity({}, {"tokenizer": "bb"}), ALONE)


def test_another_model_is_refused_by_tensor_name(tmp_path):
    folder = checkpoint.save(tmp_path, small_state(1), Identity({}), ALONE)
    with pytest.raises(CheckpointError, match=r"model/weight was \(3, 4\) torch.float32 and is \(3, 5\)"):
        checkpoint.load(folder, small_state(width=5), ALONE)
    half = small_state()
    half.module.half()
    with pytest.raises(
        CheckpointError, match=r"model/bias was \(3,\) torch.float32 and is \(3,\) torch.float16"
    ):
        checkpoint.load(folder, half, ALONE)
    with pytest.raises(CheckpointError, match=r"model/bias of shape .* has no place in it"):
        checkpoint.load(folder, State(nn.Linear(4, 3, bias=False), None), ALONE)
    with pytest.raises(CheckpointError, match=r"model/1.weight is not in it|model/weight of shape"):
        checkpoint.load(folder, State(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), None), ALONE)


def test_parameters_load_without_an_optimizer(tmp_path):
    state = small_state(3)
    folder = checkpoint.save(tmp_path, state, Identity({}), ALONE)
    other = State(nn.Linear(4, 3), None)
    checkpoint.load(folder, other, ALONE)
    assert torch.equal(other.module.weight, state.module.weight)
    assert other.step == 3


def test_an_optimizer_of_other_parameters_is_an_error(tmp_path):
    state = State(nn.Linear(2, 2), torch.optim.AdamW(nn.Linear(2, 2).parameters()), 1)
    with pytest.raises(ValueError, match="holds 2 parameters that are not among the module's"):
        checkpoint.save(tmp_path, state, Identity({}), ALONE)


def save_with_a_small_disk(world, root):
    """Rank 1 may write no file over a few kilobytes; the next save may."""
    state, _ = tiny_run.build(world)
    checkpoint.save(root, state, tiny_run.identity(), world)
    state.step = 1
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match=r"rank 1 could not save .*step_00000001.*File too large"):
        checkpoint.save(root, state, tiny_run.identity(), world)
    left = sorted(os.listdir(root))
    world.barrier()
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert checkpoint.find_latest(root, world).name == "step_00000000"
    checkpoint.save(root, state, tiny_run.identity(), world)
    return left


def test_a_full_disk_stops_every_rank_and_the_old_checkpoint_survives(tmp_path):
    for left in run_ranks(save_with_a_small_disk, 2, tmp_path):
        assert "step_00000000" in left
        assert "step_00000001" not in left
    assert sorted(os.listdir(tmp_path)) == ["step_00000000", "step_00000001"]


def test_too_little_room_is_said_in_bytes_before_anything_is_written(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes and .* has 1000 free"):
        save_steps(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"could not save .*file"):
        save_steps(tmp_path / "file", 1)


def test_leftovers_of_a_crash_are_swept_by_the_run_and_left_by_readers(tmp_path):
    save_steps(tmp_path, 1, 2)
    for name in (".tmp-step_00000003-" + "0" * 16, ".purge-step_00000001-" + "f" * 16, ".tmp-mine"):
        (tmp_path / name).mkdir()
    checkpoint.find_latest(tmp_path, ALONE)
    assert len(os.listdir(tmp_path)) == 5
    checkpoint.restore(tmp_path, small_state(), Identity({"lr": 1}), ALONE)
    assert sorted(os.listdir(tmp_path)) == [".tmp-mine", "step_00000001", "step_00000002"]


def test_the_files_hold_tensors_and_json_alone(tmp_path):
    folder = checkpoint.save(tmp_path, small_state(1), Identity({"lr": 1}), ALONE)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "manifest.json",
        "rank_00000.json",
    ]
    manifest = safe_dcp.read_manifest(folder)
    metadata = safe_dcp.read_metadata(folder, manifest)
    assert all(type(e).__name__ == "TensorStorageMetadata" for e in metadata.state_dict_metadata.values())
    assert json.loads((folder / "rank_00000.json").read_text())["extra"] == {"position": 1}
    assert manifest.config == {"lr": 1}
