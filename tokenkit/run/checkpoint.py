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
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from tokenkit.disk import free_bytes, fsync_folder, is_disk_trouble, trouble_of_disk, write_durably
from tokenkit.errors import CheckpointError, DiskError, OtherRankError
from tokenkit.parallel import World
from tokenkit.run.safe_dcp import (
    FORMAT,
    MANIFEST,
    METADATA,
    Manifest,
    damage,
    read_manifest,
    read_metadata,
    reader_and_planner,
    sha256_of,
)
from tokenkit.run.state import (
    State,
    fill_optimizer,
    local_bytes,
    random_state,
    set_random_state,
    tensors_to_load,
    tensors_to_save,
)

__all__ = ["CheckpointError", "Identity", "State", "find_latest", "load", "restore", "save"]

_STEP = re.compile(r"step_(\d{8})")
_LEFTOVER = re.compile(r"\.(tmp|purge)-step_\d{8}-[0-9a-f]{16}")
_SPARE_BYTES = 16 << 20  # manifests, plans, headers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two runs the same run."""

    config: Mapping[str, Any]
    """The resolved configuration; plain JSON values."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Digests of tokenizers, models and data, by name."""


def save(root: Path, state: State, identity: Identity, world: World, *, keep_last: int = 2) -> Path:
    """Commit a checkpoint as `root/step_N`; return its folder. Every rank calls it.

    Then all but the newest `keep_last` checkpoints are deleted.

    Raises:
        FileExistsError: the step is there already; nothing is ever overwritten.
        CheckpointError: a rank could not write, or the disk has too little room. What was there stays.
    """
    if keep_last < 2:
        raise ValueError(f"keep_last must be at least 2, got {keep_last}: one may turn out damaged")
    final = root / f"step_{state.step:08d}"
    if world.broadcast(final.exists() or final.is_symlink()):
        raise FileExistsError(f"{final} is there already: checkpoints are never overwritten, move it away")
    tensors = tensors_to_save(state)
    temporary = root / f".tmp-{final.name}-{world.broadcast(secrets.token_hex(8))}"
    try:
        with _as_checkpoint_error("save", final, world):
            needed = sum(world.gather(local_bytes(tensors))) + _SPARE_BYTES
            with world.together("make room for a checkpoint"):
                if world.is_main:
                    _make_room(root, temporary, needed)
            _write(temporary, tensors, world)
            with world.together("write its own state"):
                _write_rank_state(temporary, state, world)
            with world.together("hash its shards"):
                mine = _hashes(temporary, world)
            files = {name: entry for part in world.gather(mine) for name, entry in sorted(part.items())}
            with world.together("commit the checkpoint"):
                if world.is_main:
                    _commit(temporary, final, _manifest(state, identity, world, files))
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if world.is_main:
        _purge(root, keep_last)
    return final


@contextmanager
def _as_checkpoint_error(what: str, folder: Path, world: World) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, OtherRankError):
        raise
    except OSError as error:
        raise _failed(what, folder, world.rank, error) from error
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise _failed(what, folder, rank, cause) from error


def _failed(what: str, folder: Path, rank: int, cause: BaseException) -> CheckpointError:
    """Return the error of `rank`, with the exit code of a disk where that is at fault."""
    is_disk = is_disk_trouble(cause)
    words = trouble_of_disk(folder, cause) if is_disk else f"{type(cause).__name__}: {cause}"
    error = CheckpointError(f"rank {rank} could not {what} {folder}: {words}")
    error.exit_code = DiskError.exit_code if is_disk else CheckpointError.exit_code
    return error


def _make_room(root: Path, temporary: Path, needed: int) -> None:
    root.mkdir(mode=0o750, parents=True, exist_ok=True)
    fsync_folder(root.parent)
    free = free_bytes(root)
    if free < needed:
        raise DiskError(
            f"a checkpoint needs {needed} bytes and {root} has {free} free: make room and go on with "
            "--resume, or choose another output_dir"
        )
    temporary.mkdir(mode=0o750)


def _write(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=False)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _knowing_that_it_is_alone(world):
        dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=world.mesh is None)


def _write_rank_state(folder: Path, state: State, world: World) -> None:
    text = json.dumps({"extra": state.extra, "rng": random_state(world.device)}, allow_nan=False)
    write_durably(folder / _rank_file(world.rank), text)


@contextmanager
def _knowing_that_it_is_alone(world: World) -> Iterator[None]:
    """Keep DCP from warning that a single process is a single process."""
    with warnings.catch_warnings():
        if world.mesh is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _hashes(folder: Path, world: World) -> dict[str, tuple[int, str]]:
    """Return size and digest of every file that this rank wrote."""
    names = [path.name for path in folder.glob(f"__{world.rank}_*")] + [_rank_file(world.rank)]
    names += [METADATA] * world.is_main
    return {name: ((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}


def _manifest(state: State, identity: Identity, world: World, files: dict[str, tuple[int, str]]) -> Manifest:
    return Manifest(
        format=FORMAT,
        step=state.step,
        world_size=world.world_size,
        torch=torch.__version__,
        config=_plain(identity.config),
        fingerprints=_plain(identity.fingerprints),
        files=files,
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    write_durably(temporary / MANIFEST, manifest.to_json())
    os.rename(temporary, final)  # fails on a folder that holds something: never overwrites
    fsync_folder(final.parent)


def _purge(root: Path, keep_last: int) -> None:
    """Delete old checkpoints: first out of sight by one rename, then file by file."""
    for folder in _committed(root)[:-keep_last]:
        aside = root / f".purge-{folder.name}-{secrets.token_hex(8)}"
        # the new checkpoint is safe: a disk that will not delete is no reason to stop
        with suppress(OSError):
            os.rename(folder, aside)
            shutil.rmtree(aside)


def _committed(root: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first; links are left alone."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


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
    names = world.broadcast([folder.name for folder in reversed(_committed(root))])
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
            if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
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
        _flat("", _plain(x.config)) | _flat("", {"fingerprints": _plain(x.fingerprints)})
        for x in (saved, now)
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
    with _as_checkpoint_error("load", folder, world):
        with _knowing_that_it_is_alone(world):
            dcp.load(targets, no_dist=world.mesh is None, **reader_and_planner(folder, metadata))
        fill_optimizer(state, targets)


def _load(folder: Path, manifest: Manifest, state: State, world: World) -> None:
    load_tensors(folder, manifest, state, world)
    with _as_checkpoint_error("load", folder, world), world.together("read the state of each rank"):
        _load_rank_state(folder, manifest, state, world)
    state.step = manifest.step


def _load_rank_state(folder: Path, manifest: Manifest, state: State, world: World) -> None:
    same_ranks = manifest.world_size == world.world_size
    wanted = [world.rank] if same_ranks else range(manifest.world_size)
    try:
        ranks = [json.loads((folder / _rank_file(rank)).read_text(encoding="utf-8")) for rank in wanted]
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
