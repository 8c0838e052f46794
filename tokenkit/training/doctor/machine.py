"""The machine before a run: versions, GPUs, memory, fast kernels, room on the disk."""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import torch

from tokenkit.config import TrainConfig
from tokenkit.disk import check_vacant, free_bytes
from tokenkit.errors import MEMORY_REMEDY, DiskError
from tokenkit.run.facts import versions
from tokenkit.run.folder import check_output
from tokenkit.training.doctor.findings import Findings, many
from tokenkit.training.estimate import GIB, RESERVED, Estimate

PACKAGE = "tokenkit-torch"
_FAST = {
    "flash_attn": ("flash attention", "pip install 'tokenkit-torch[flash]', then use_flash_attention"),
    "liger_kernel": ("Liger's fused layers", "pip install liger-kernel"),
}


def check_versions(found: Findings) -> None:
    """Compare installed packages with what the package asks for."""
    installed = versions()
    found.note("machine", ", ".join(f"{name} {version}" for name, version in installed.items()))
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in requires(PACKAGE) or ()]
    except (ImportError, PackageNotFoundError):  # run from its sources: nobody installed it
        return
    for one in wanted:
        asked = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", "train"))
        version = installed.get(one.name)
        if asked and version is not None and not one.specifier.contains(version, prereleases=True):
            found.warning(
                "machine", f"{one.name} {version} is installed, and {PACKAGE} asks for {one.specifier}",
                f"pip install '{one.name}{one.specifier}'",
            )  # fmt: skip


def check_device(config: TrainConfig, found: Findings) -> None:
    """Say which GPUs there are, and which fast kernels; what was asked for and is absent stops a run."""
    count = torch.cuda.device_count()
    if count:
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        found.note("machine", f"{count} GPUs: {names}")
        if count > 1 and "WORLD_SIZE" not in os.environ:
            found.note(
                "machine", f"one process uses one of {count} GPUs", f"torchrun --nproc-per-node {count}"
            )
        if config.training.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(
            including_emulation=False
        ):
            found.warning(
                "machine", "dtype bfloat16 is only imitated by this GPU, which is slow", "dtype float16"
            )
    else:
        found.note("machine", f"no GPU: {many(torch.get_num_threads(), 'thread')} on the processor")
    for module, (name, way) in _FAST.items():
        has = importlib.util.find_spec(module) is not None
        found.note(
            "machine", f"{name}: {'installed' if has else 'not installed'}", "" if has or not count else way
        )
    asked = config.training.attention or ""
    if asked == "flash_attention_2" and not (count and importlib.util.find_spec("flash_attn")):
        lack = "flash_attn is not installed" if count else "there is no GPU"
        found.error(
            "machine", f"attn_implementation {asked}: {lack}", "set attn_implementation to sdpa, or null"
        )


def check_memory(said: Estimate, found: Findings) -> None:
    """Compare what one process is estimated to need with what the machine has."""
    where, room = "this machine", _free_memory()
    if torch.cuda.is_available():
        where, room = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] - RESERVED
    if room is None:
        return
    words = f"a process needs about {said.peak / GIB:.1f} GiB, and {where} has {room / GIB:.1f} GiB for it"
    if said.peak > room:
        found.warning("machine", f"memory: {words}", MEMORY_REMEDY)
    else:
        found.note("machine", f"memory: {words}")


def _free_memory() -> float | None:
    """Return the bytes that a process may still have, where Linux says it."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return None


def check_folder(config: TrainConfig, found: Findings) -> None:
    """Look at the folders that the run writes to, without making them."""
    folder = Path(config.run.output_dir).expanduser()
    with found.trying("disk"):
        check_output(folder, resume=config.run.resume)
        check_vacant(folder, (), "output_dir")  # it can be written
    if config.run.export_to is not None:
        with found.trying("disk"):
            check_vacant(Path(config.run.export_to).expanduser(), flag="export_to")


def check_room(config: TrainConfig, said: Estimate, found: Findings) -> None:
    """Compare the disk with a checkpoint, with all that are kept, and with the export."""
    folder = Path(config.run.output_dir).expanduser().absolute()
    free = free_bytes(next(place for place in (folder, *folder.parents) if place.exists()))
    one, export = said.checkpoint, float(said.counted.weights)
    kept = config.schedule.keep_checkpoints
    needed = (kept + 1) * one + export  # the next is written before the oldest goes
    words = (
        f"{free / GIB:,.1f} GiB are free for {folder}; a checkpoint takes {one / GIB:,.2f} GiB, {kept} are "
        f"kept while the next is written, and the export takes {export / GIB:,.2f} GiB"
    )
    if free < one + export:
        found.error("disk", words, "make room, or name another output_dir", code=DiskError.exit_code)
    elif free < needed:
        found.warning("disk", words, "make room, or name another output_dir")
    else:
        found.note("disk", words)
