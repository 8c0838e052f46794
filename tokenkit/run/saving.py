"""How a checkpoint is written: all of it or none, at once or while training goes on.

    Snapshot          what this rank will write; a copy where training goes on meanwhile
    write             the files, the manifest, the rename; every rank's, talking to each other
    Background        runs `write` on a thread of each rank, one checkpoint at a time

PyTorch's `async_save` is not used: it reports a failure to whoever asks its future alone, its copy leaves out
sharded scalars, and without a group of its own its thread speaks between the collectives of training.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from tokenkit.parallel import World, apart
from tokenkit.run.safe_dcp import FORMAT, MANIFEST, METADATA, Manifest, sha256_of
from tokenkit.run.state import State, local_bytes, random_state, tensors_to_save

STEP = re.compile(r"step_(\d{8})")
LEFTOVER = re.compile(r"\.(tmp|purge)-step_\d{8}-[0-9a-f]{16}")
FEWEST = 2  # checkpoints that are kept: the newest may turn out damaged
_SPARE_BYTES = 16 << 20  # manifests, plans, headers


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two runs the same run."""

    config: Mapping[str, Any]
    """The resolved configuration; plain JSON values."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Digests of tokenizers, models and data, by name."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one rank writes of a checkpoint."""

    step: int
    tensors: dict[str, Tensor]
    """Its shards."""
    own: str
    """JSON of `State.extra` and the random generators, as they stood."""

    @classmethod
    def of(cls, state: State, world: World, *, copied: bool) -> Snapshot:
        """Take it; `copied`: into the machine's memory, where later steps move nothing."""
        tensors = tensors_to_save(state)
        if copied:
            with torch.no_grad():
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        own = json.dumps({"extra": state.extra, "rng": random_state(world.device)}, allow_nan=False)
        return cls(state.step, tensors, own)


def save(root: Path, state: State, identity: Identity, world: World, *, keep_last: int = FEWEST) -> Path:
    """Commit a checkpoint as `root/step_N`; return its folder. Every rank calls it.

    Then all but the newest `keep_last` checkpoints are deleted.

    Raises:
        FileExistsError: the step is there already; nothing is ever overwritten.
        CheckpointError: a rank could not write, or the disk has too little room. What was there stays.
    """
    return write(root, Snapshot.of(state, world, copied=False), identity, world, keep_last)


def write(root: Path, snapshot: Snapshot, identity: Identity, world: World, keep_last: int) -> Path:
    """Commit what `Snapshot.of` took on each rank; see `save`."""
    if keep_last < FEWEST:
        raise ValueError(f"keep_last must be at least {FEWEST}, got {keep_last}: one may turn out damaged")
    final = root / f"step_{snapshot.step:08d}"
    if world.broadcast(final.exists() or final.is_symlink()):
        raise FileExistsError(f"{final} is there already: checkpoints are never overwritten, move it away")
    temporary = root / f".tmp-{final.name}-{world.broadcast(secrets.token_hex(8))}"
    try:
        with as_checkpoint_error("save", final, world):
            needed = sum(world.gather(local_bytes(snapshot.tensors))) + _SPARE_BYTES
            with world.together("make room for a checkpoint"):
                if world.is_main:
                    _make_room(root, temporary, needed)
            _write_tensors(temporary, snapshot.tensors, world)
            with world.together("write its own state"):
                write_durably(temporary / rank_file(world.rank), snapshot.own)
            with world.together("hash its shards"):
                mine = _hashes(temporary, world)
            files = {name: entry for part in world.gather(mine) for name, entry in sorted(part.items())}
            with world.together("commit the checkpoint"):
                if world.is_main:
                    _commit(temporary, final, _manifest(snapshot.step, identity, world, files))
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if world.is_main:
        _purge(root, keep_last)
    return final


class Background:
    """Writes checkpoints on a thread of each rank while training goes on, one at a time.

    Whoever trains asks between its steps `has_failed`, and `is_written`, and waits with `finish`. The
    threads speak to each other over a group of their own. Every rank makes one, and calls it alike.

    Args:
        world: whose threads write.
        timeout: seconds that the thread of another rank may keep this one waiting.
    """

    def __init__(self, world: World, timeout: float):
        self._world = apart(world, timeout)
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_written = False

    @property
    def is_busy(self) -> bool:
        """Whether one was begun that nobody has waited for with `finish`."""
        return self._thread is not None

    @property
    def has_failed(self) -> bool:
        """Whether the one that was begun could not be written: `finish` raises why."""
        return self._error is not None

    @property
    def is_written(self) -> bool:
        """Whether the one that was begun is committed: `finish` does not wait."""
        return self._is_written

    def begin(self, root: Path, state: State, identity: Identity, keep_last: int) -> None:
        """Copy what changes while training, wait for the one before, and write this one behind the scenes.

        Raises:
            CheckpointError, FileExistsError: the one before could not be written.
        """
        self.finish()
        snapshot = Snapshot.of(state, self._world, copied=True)
        self._is_written = False
        job = (lambda: write(root, snapshot, identity, self._world, keep_last),)
        # a daemon: a process that ends for another reason does not wait for it; see `leave`
        self._thread = threading.Thread(target=self._run, args=job, name="tokenkit-checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the one that was begun is committed.

        Raises:
            CheckpointError, FileExistsError: it could not be.
        """
        self._join(None)
        if (error := self._error) is not None:
            self._error = None
            raise error

    def leave(self) -> None:
        """Let the one that was begun come to its end; what it says is lost, as the run ends otherwise."""
        self._join(self._timeout)

    def _join(self, timeout: float | None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None

    def _run(self, job: Callable[[], Path]) -> None:
        try:
            job()
        except BaseException as error:  # `finish` raises it where the run can end
            self._error = error
        else:
            self._is_written = True


@contextmanager
def as_checkpoint_error(what: str, folder: Path, world: World) -> Iterator[None]:
    """Name the rank and the folder in what goes wrong in the block.

    Raises:
        CheckpointError: in place of an error of the disk or of PyTorch's checkpoints.
    """
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


def _write_tensors(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=False)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    expect_one_process(world)
    dcp.save(
        tensors,
        storage_writer=writer,
        planner=planner,
        process_group=world.group,
        no_dist=world.mesh is None,
    )


def expect_one_process(world: World) -> None:
    """Keep DCP from warning that a single process is a single process.

    The filter stays: one that is taken back would take back what another thread filters meanwhile.
    """
    if world.mesh is None:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def rank_file(rank: int) -> str:
    """Return the name of the file that holds what is a rank's own."""
    return f"rank_{rank:05d}.json"


def _hashes(folder: Path, world: World) -> dict[str, tuple[int, str]]:
    """Return size and digest of every file that this rank wrote."""
    names = [path.name for path in folder.glob(f"__{world.rank}_*")] + [rank_file(world.rank)]
    names += [METADATA] * world.is_main
    return {name: ((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}


def _manifest(step: int, identity: Identity, world: World, files: dict[str, tuple[int, str]]) -> Manifest:
    return Manifest(
        format=FORMAT,
        step=step,
        world_size=world.world_size,
        torch=torch.__version__,
        config=plain(identity.config),
        fingerprints=plain(identity.fingerprints),
        files=files,
    )


def plain(value: Any) -> Any:
    """Return `value` as JSON gives it back."""
    return json.loads(json.dumps(value, allow_nan=False))


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    write_durably(temporary / MANIFEST, manifest.to_json())
    os.rename(temporary, final)  # fails on a folder that holds something: never overwrites
    fsync_folder(final.parent)


def _purge(root: Path, keep_last: int) -> None:
    """Delete old checkpoints: first out of sight by one rename, then file by file."""
    for folder in committed(root)[:-keep_last]:
        aside = root / f".purge-{folder.name}-{secrets.token_hex(8)}"
        # the new checkpoint is safe: a disk that will not delete is no reason to stop
        with suppress(OSError):
            os.rename(folder, aside)
            shutil.rmtree(aside)


def committed(root: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first; links are left alone."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if STEP.fullmatch(p.name) and p.is_dir() and not p.is_symlink())
