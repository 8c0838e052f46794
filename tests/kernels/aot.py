"""Compile every Triton kernel for GPUs that are not here, and report what each would use. Run as a script.

    python -m tests.kernels.aot          prints JSON, one record per kernel, variant and architecture
    python -m tests.kernels.aot --less   all for sm_90, for the others what is launched otherwise there

It must run without TRITON_INTERPRET, in a process of its own, with an empty TRITON_CACHE_DIR. A launch is
imitated through `warmup` under a stub driver, so arguments are specialised as they would be.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.kernels.aot_divergence import divergence_launches
from tests.kernels.aot_fused import fused_launches
from tokenkit.kernels import (
    alm_difference,
    chunk_likelihood,
    logprob_tile,
    sorted_tile,
)

ARCHITECTURES = (80, 90, 100)
ALL_FOR = 90
"""With `--less`, the others get the fused kernels alone: no other launch asks for the architecture."""
F32, F64, BF16, I64 = torch.float32, torch.float64, torch.bfloat16, torch.int64
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class StubDriver:
    """Claims a GPU of one architecture; the device index differs, because compiled kernels are kept by it."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0


def launches(architecture):
    """Yield (name, kernel, positional arguments, keyword arguments), as the launchers pass them."""
    yield from fused_launches(architecture)
    fold, dlogits = logprob_tile._fold_kernel, logprob_tile._dlogits_kernel
    for name, flags in {
        "statistics": {},
        "cached": {"CACHED": True},
        "frozen": {"FROZEN": True},
        "frozen softcap bias": {"FROZEN": True, "HAS_CAP": True, "HAS_BIAS": True},
    }.items():
        flags = dict.fromkeys(("HAS_BIAS", "HAS_CAP", "CACHED", "FROZEN"), False) | flags
        bias = BF16 if flags["HAS_BIAS"] else None
        p = BF16 if flags["CACHED"] or flags["FROZEN"] else None
        for V in (8192,):
            arguments = (F32, bias, I64, F32, F32, F32, p, F32, 4096, V, 1.0, 1.0)
            yield f"fold {name} {V}", fold, arguments, flags | {
                "BLOCK_V": V, "num_warps": logprob_tile.fold_warps(V)
            }  # fmt: skip
    for name, source, flags in (
        ("recompute", F32, {}),
        ("recompute softcap bias", F32, {"HAS_CAP": True, "HAS_BIAS": True}),
        ("cached", BF16, {"CACHED": True}),
    ):
        flags = dict.fromkeys(("HAS_BIAS", "HAS_CAP", "CACHED"), False) | flags
        bias = BF16 if flags["HAS_BIAS"] else None
        arguments = (source, bias, I64, F32, F32, F32, BF16, 4096, 4096, 1.0, 1.0)
        yield f"dlogits {name}", dlogits, arguments, flags | {"BLOCK_V": logprob_tile.BLOCK_V}
    yield "rescale", logprob_tile._rescale_kernel, (F32, F32, 4096), {"BLOCK_D": logprob_tile.BLOCK_D}
    yield (
        "span_sum", chunk_likelihood._span_sum_kernel, (F32, I64, I64, F32, 1024, 2048, 16384),
        {"BLOCK_C": chunk_likelihood.BLOCK_C},
    )  # fmt: skip
    for kind in alm_difference.DIFFERENCES:
        options = {"KIND": kind, "TEMPERATURE": 100.0, "ALPHA": 0.5, "EPSILON": alm_difference.EPS}
        options["BLOCK_C"] = alm_difference.BLOCK_C
        yield f"difference {kind}", alm_difference._difference_kernel, (F32, F32, F32, F32, 16384), options

    yield from sorted_launches()
    yield from divergence_launches()


def sorted_launches():
    """Yield what `sorted_distance` launches."""
    V, bins, block = 128_256, sorted_tile.BINS, {"BLOCK_V": sorted_tile.BLOCK_V}
    yield "sorted statistics", sorted_tile._statistics_kernel, (F32, F32, F32, V), block
    histogram = (F32, F32, F32, F32, I64, V, bins)
    options = {"BLOCK_V": sorted_tile.HISTOGRAM_BLOCK_V}
    yield "sorted histogram", sorted_tile._histogram_kernel, histogram, options
    merge = (I64, I64, F32, F32, torch.int8, F32, bins)
    options = {"BLOCK_B": sorted_tile.BLOCK_B, "num_warps": sorted_tile.MERGE_WARPS}
    yield "sorted merge", sorted_tile._merge_kernel, merge, options
    for name, cap in (("", False), (" softcap", True)):
        arguments = (F32, F32, F32, F32, F32, F32, torch.int8, BF16, V, bins, 1.0)
        yield f"sorted dlogits{name}", sorted_tile._dlogits_kernel, arguments, block | {"HAS_CAP": cap}


def resources(compiled):
    """Return registers, stack and local bytes of a compiled kernel, as its own machine code states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    registers, stack, local = (int(re.search(rf"{x}:(\d+)", text)[1]) for x in ("REG", "STACK", "LOCAL"))
    tma = "cp.async.bulk.tensor" in compiled.asm["ptx"]
    shared = compiled.metadata.shared
    return {"registers": registers, "stack": stack, "local": local, "shared": shared, "tma": tma}


def main():
    less = sys.argv[1:] == ["--less"]
    records = []
    for architecture in ARCHITECTURES:
        driver.set_active(StubDriver(architecture))
        chosen = fused_launches if less and architecture != ALL_FOR else launches
        for name, kernel, arguments, options in chosen(architecture):
            compiled = kernel.warmup(*arguments, grid=(1,), **options)
            records.append({"kernel": name, "sm": architecture, **resources(compiled)})
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()
