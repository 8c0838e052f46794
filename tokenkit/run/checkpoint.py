"""Checkpoints that a crash at any moment cannot spoil, and a resume that repeats the run bit for bit.

    .tmp-step_N-x/   every rank writes its shards and its JSON, with fsync, and hashes them
                     rank 0 writes manifest.json, last
    step_N/          renamed into place, and never written again
    .quarantine-*    found damaged while a run looked for its newest intact checkpoint; never deleted

Tensors (trainable parameters, persistent buffers, the optimizer's moments) go through PyTorch's
distributed checkpoints and may be loaded by another number of ranks. Everything else is JSON.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tokenkit.errors import CheckpointError
from tokenkit.parallel import World
from tokenkit.run.safe_dcp import Manifest, damage, read_manifest, read_metadata, reader_and_planner
from tokenkit.run.saving import (
    LEFTOVER,
    Identity,
    as_checkpoint_error,
    committed,
    expect_one_process,
    plain,
    rank_file,
    save,
)
from tokenkit.run.state import State, fill_optimizer, set_random_state, tensors_to_load

__all__ = ["CheckpointError", "Identity", "State", "find_latest", "load", "restore", "save"]

logger = logging.getLogger(__name__)


def find_latest(root: Path, world: World, *, repair: bool = False) -> Path | None:
    """Return the newest intact checkpoint, every byte of it compared with its manifest; None: no run yet.

    Args:
        root: the folder `checkpoints` of a run.
        world: every rank calls this, and hashes its share of the files.
        repair: move damaged newer checkpoints aside and delete what an interrupted save or purge left.
            Only for the run that owns the folder.

    Raises:
        CheckpointError: there are checkpoints and none is intact. Nothing is moved or deleted then.
    """
    names = world.broadcast([folder.name for folder in reversed(committed(root))])
    bad: dict[str, str] = {}
    for name in names:
        reason = _examine(root / name, world)
        if reason is None:
            _repair(root, bad if repair else None, world)
            return root / name
        bad[name] = reason
    aside = world.broadcast(sorted(p.name for p in root.glob(".quarantine-*")) if world.is_main else [])
    if bad or aside:
        listed = "; ".join([f"{name}: {reason}" for name, reason in bad.items()] + aside)
        raise CheckpointError(
            f"no checkpoint in {root} is intact ({listed}). Nothing was deleted: put an intact one back, "
            "or start again in another output_dir"
        )
    _repair(root, {} if repair else None, world)
    return None


def _examine(folder: Path, world: World) -> str | None:
    """Say what is wrong with a checkpoint, None if nothing; the ranks share the reading."""
    try:
        manifest = read_manifest(folder)
        mine = sorted(manifest.files)[world.rank :: world.world_size]
        reason = damage(folder, manifest, mine)
        if reason is None and folder.name != f"step_{manifest.step:08d}":
            reason = f"its manifest is that of step {manifest.step}"
    except CheckpointError as error:
        reason = str(error)
    return next((found for found in world.gather(reason) if found is not None), None)


def _repair(root: Path, bad: Mapping[str, str] | None, world: World) -> None:
    """Move the damaged aside and delete leftovers; None: touch nothing."""
    with world.together("move damaged checkpoints aside"):
        if bad is None or not world.is_main or not root.is_dir():
            return
        for name, reason in bad.items():
            aside = root / f".quarantine-{name}-{time.time_ns()}"
            os.rename(root / name, aside)
            logger.warning("checkpoint %s is damaged (%s): moved to %s", name, reason, aside.name)
        for path in sorted(root.iterdir()):
            if LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


def restore(
    root: Path, state: State, identity: Identity, world: World, *, may_differ: Collection[str] = ()
) -> Path | None:
    """Continue from the newest intact checkpoint of this run, if it has one; return its folder.

    Fills parameters, optimizer, `state.step`, `state.extra` and, for the same number of ranks, all random
    generators.

    Args:
        root: the folder `checkpoints` of a run.
        state: built as for a new run.
        identity: of this run.
        world: every rank calls this.
        may_differ: dotted names of the configuration that may change; a name covers what lies below it.

    Raises:
        ValueError: the checkpoint is of another configuration; the message shows each difference.
        CheckpointError: see `find_latest` and `load`.
    """
    folder = find_latest(root, world, repair=True)
    if folder is None:
        return None
    manifest = read_manifest(folder)
    changes = differences(Identity(manifest.config, manifest.fingerprints), identity, may_differ)
    if changes:
        raise ValueError(
            f"{folder} is of another configuration (saved -> now):\n  " + "\n  ".join(changes) + "\n"
            "give the saved values back, or start a new run in another output_dir"
        )
    _load(folder, manifest, state, world)
    return folder


def differences(saved: Identity, now: Identity, may_differ: Collection[str] = ()) -> list[str]:
    """Return one line per field that is not what it was when `saved` was written."""
    old, new = (
        _flat("", plain(x.config)) | _flat("", {"fingerprints": plain(x.fingerprints)}) for x in (saved, now)
    )
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in may_differ)
    ]


def _flat(prefix: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value)}
    dot = f"{prefix}." if prefix else ""
    return {name: leaf for key in value for name, leaf in _flat(f"{dot}{key}", value[key]).items()}


def load(folder: Path, state: State, world: World) -> None:
    """Load one checkpoint into `state` after comparing every byte with its manifest. Every rank calls it.

    Raises:
        CheckpointError: it is damaged, unsafe, or its tensors are not those of `state`.
    """
    _load(folder, check_whole(folder, world), state, world)


def check_whole(folder: Path, world: World) -> Manifest:
    """Compare every byte of one checkpoint with its manifest, and return that. Every rank calls it.

    Raises:
        CheckpointError: it is damaged.
    """
    reason = _examine(folder, world)
    if reason is not None:
        raise CheckpointError(f"{folder} cannot be loaded: {reason}")
    return read_manifest(folder)


def load_tensors(
    folder: Path, manifest: Manifest, state: State, world: World, within: str = "model/"
) -> None:
    """Load tensors of a checkpoint that was found whole, and nothing else; any number of ranks saved it.

    Args:
        folder: of the checkpoint.
        manifest: as it was read there.
        state: its module's tensors are filled; without an optimizer the moments stay in the file.
        world: every rank calls this.
        within: see `tensors_to_load`.

    Raises:
        CheckpointError: it is unsafe, or its tensors are not those of `state`.
    """
    metadata = read_metadata(folder, manifest)
    targets = tensors_to_load(state, metadata, within)
    with as_checkpoint_error("load", folder, world):
        expect_one_process(world)
        dcp.load(targets, no_dist=world.mesh is None, **reader_and_planner(folder, metadata))
        fill_optimizer(state, targets)


def _load(folder: Path, manifest: Manifest, state: State, world: World) -> None:
    load_tensors(folder, manifest, state, world)
    with as_checkpoint_error("load", folder, world), world.together("read the state of each rank"):
        _load_rank_state(folder, manifest, state, world)
    state.step = manifest.step


def _load_rank_state(folder: Path, manifest: Manifest, state: State, world: World) -> None:
    same_ranks = manifest.world_size == world.world_size
    wanted = [world.rank] if same_ranks else range(manifest.world_size)
    try:
        ranks = [json.loads((folder / rank_file(rank)).read_text(encoding="utf-8")) for rank in wanted]
        state.extra = ranks[0]["extra"]
        if same_ranks:
            set_random_state(ranks[0]["rng"], world.device)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder} holds no state of a rank that can be read: {error!r}") from error
    if any(rank["extra"] != state.extra for rank in ranks):
        raise CheckpointError(
            f"{folder} holds another position in the data for each of {manifest.world_size} ranks, and this "
            f"run has {world.world_size}: start as many processes as before"
        )
    if not same_ranks:
        torch.manual_seed(torch.initial_seed() + manifest.step)  # not the masks of the first steps again
