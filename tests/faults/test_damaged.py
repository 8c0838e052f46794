"""Damaged checkpoints are seen, moved aside and never deleted; the one before is used."""

import json
import os
import random

import pytest
import torch
from torch import nn

from tests.faults import tiny_run
from tests.faults.registry import fault
from tests.ranks import run_ranks
from tokenkit import parallel
from tokenkit.errors import CheckpointError
from tokenkit.run import checkpoint, safe_dcp
from tokenkit.run.checkpoint import Identity, State

ALONE = parallel.World(0, 1, torch.device("cpu"), None)


def state_at(step):
    torch.manual_seed(step)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return State(module, optimizer, step)


@pytest.fixture
def root(tmp_path):
    """Two checkpoints, steps 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path, state_at(step), Identity({}), ALONE)
    return tmp_path


def newest(root):
    return checkpoint.find_latest(root, ALONE).name


def truncate(folder):
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size - 1)


def grow(folder):
    with (folder / "__0_0.distcp").open("ab") as file:
        file.write(b"0")


def empty_plan(folder):
    os.truncate(folder / ".metadata", 0)


def lose_shard(folder):
    (folder / "__0_0.distcp").unlink()


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def tear_manifest(folder):
    os.truncate(folder / "manifest.json", 100)


def swap_step(folder):
    folder.rename(folder.with_name("step_00000007"))


def link_shard(folder):
    (folder / "__0_0.distcp").rename(folder.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "elsewhere")


@fault(
    "A file of the newest checkpoint is torn, empty, missing or a link",
    "the one before is used; the damaged one is kept as .quarantine-*, and said",
    code="-",
    kept="everything",
)
@pytest.mark.parametrize(
    "spoil",
    [truncate, grow, empty_plan, lose_shard, lose_manifest, tear_manifest, swap_step, link_shard],
    ids=lambda f: f.__name__,
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damaged_one_kept(spoil, root, caplog):
    spoil(root / "step_00000002")
    content = {p.name for p in root.glob("step_*") if p.name != "step_00000001"}
    state = state_at(0)
    checkpoint.restore(root, state, Identity({}), ALONE)
    assert state.step == 1
    assert torch.equal(state.module.weight, state_at(1).module.weight)
    aside = [p for p in root.iterdir() if p.name.startswith(".quarantine-")]
    assert [p.name.split("-")[1] for p in aside] == sorted(content)
    assert any(p.stat().st_size for p in aside[0].iterdir())
    assert "is damaged" in caplog.text


@fault(
    "A bit of a checkpoint flips on the disk",
    "seen by its digest; as for a torn file",
    code="-",
    kept="everything",
)
def test_every_single_flipped_bit_is_seen(root):
    folder = root / "step_00000002"
    files = sorted(folder.iterdir())
    rng = random.Random(0)
    for _ in range(150):
        path = rng.choice(files)
        content = path.read_bytes()
        position = rng.randrange(len(content))
        flipped = bytes([content[position] ^ (1 << rng.randrange(8))])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        assert newest(root) == "step_00000001", f"byte {position} of {path.name}"
        path.write_bytes(content)
    assert newest(root) == "step_00000002"


def test_a_reader_moves_nothing(root):
    truncate(root / "step_00000002")
    before = sorted(os.listdir(root))
    assert newest(root) == "step_00000001"
    assert sorted(os.listdir(root)) == before


@fault(
    "No checkpoint is whole",
    "refused: a run never begins again by itself",
    code=65,
    kept="everything",
)
def test_where_none_is_intact_the_run_stops_and_nothing_is_moved(root):
    for folder in ("step_00000001", "step_00000002"):
        truncate(root / folder)
    for _ in range(2):  # starting again must not turn into a new run
        with pytest.raises(
            CheckpointError, match=r"no checkpoint in .* is intact .*__0_0.distcp has \d+ bytes"
        ):
            checkpoint.restore(root, state_at(0), Identity({}), ALONE)
        assert sorted(os.listdir(root)) == ["step_00000001", "step_00000002"]


def test_a_quarantine_without_an_intact_checkpoint_is_no_new_run(root):
    truncate(root / "step_00000002")
    checkpoint.restore(root, state_at(0), Identity({}), ALONE)
    (root / "step_00000001").rename(root / "gone")
    with pytest.raises(CheckpointError, match="quarantine-step_00000002"):
        checkpoint.restore(root, state_at(0), Identity({}), ALONE)


def test_one_damaged_checkpoint_asked_for_by_name_is_refused(root):
    truncate(root / "step_00000002")
    with pytest.raises(CheckpointError, match=r"cannot be loaded: __0_0.distcp has \d+ bytes, expected"):
        checkpoint.load(root / "step_00000002", state_at(0), ALONE)
    with pytest.raises(CheckpointError, match="expected a folder"):
        checkpoint.load(root / "nowhere", state_at(0), ALONE)


def resume_after_damage(world, folder):
    state, _ = tiny_run.build(world)
    used = checkpoint.restore(folder, state, tiny_run.identity(), world)
    return used.name


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "rank_00001.json", "manifest.json"]
)
def test_ranks_agree_on_what_is_damaged_whoever_reads_it(name, tmp_path):
    run_ranks(tiny_run.run, 2, str(tmp_path), 6)
    path = tmp_path / "checkpoints/step_00000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert run_ranks(resume_after_damage, 2, tmp_path / "checkpoints") == ["step_00000003"] * 2


def test_a_manifest_of_another_format_says_so(root):
    path = root / "step_00000002/manifest.json"
    body = json.loads(path.read_text())["manifest"] | {"format": 2}
    path.write_text(json.dumps({"manifest": body, "sha256": safe_dcp._digest(body)}))
    with pytest.raises(CheckpointError, match="its format is 2, this version of tokenkit reads 1"):
        safe_dcp.read_manifest(path.parent)
