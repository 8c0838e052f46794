"""Compile every Triton kernel for GPUs that are not here, and report what each would use. Run as a script.

    python -m tests.kernels.aot          prints JSON, one record per kernel, variant and architecture
    python -m tests.kernels.aot --less   all for sm_90, some of the sweep; for others what differs there
    python -m tests.kernels.aot --sweep  what else launchers make: dtypes, ragged sizes, bias, cap, subset

It must run without TRITON_INTERPRET, in a process of its own, with an empty TRITON_CACHE_DIR. A launch is
imitated through `warmup` under a stub driver, so arguments are specialised as they would be.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import islice, product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.kernels.aot_divergence import divergence_launches
from tests.kernels.aot_fused import fused_launches
from tests.kernels.aot_fused import launches as fused_variants
from tests.kernels.aot_peer import peer_launches
from tokenkit.kernels import alm_difference, chunk_likelihood, projected_divergence
from tokenkit.kernels.linear_ensemble import tile as ensemble_tile
from tokenkit.kernels.linear_logprob import tiled as logprob_tile
from tokenkit.kernels.sorted_distance import tile as sorted_tile

ARCHITECTURES = (80, 90, 100)
EVERY = 29
"""With `--less`, each so many-th of the sweep is compiled: a prime, so that all kernels have their turn."""
ALL_FOR = 90
"""With `--less`, the others get the fused kernels alone: no other launch asks for the architecture."""
F32, BF16, I64, U8 = torch.float32, torch.bfloat16, torch.int64, torch.uint8
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
    yield from logprob_launches()
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
    yield from projected_launches()
    yield from peer_launches()
    yield from divergence_launches()
    yield from ensemble_launches()


def sweep(architecture):
    """Yield every launch over dtypes and sizes that divide nothing, as the launchers may make them."""
    dtypes = (BF16, torch.float16, F32)
    for dtype, everything in product(dtypes, (False, True)):
        yield from fused_variants(architecture, dtype, everything)
    yield from logprob_launches(dtypes, (128, 2048, 4093, 8192, 8191))
    yield from sorted_launches(dtypes, (128_256, 151_665))
    yield from projected_launches(dtypes, (128_256, 151_665))
    yield from divergence_launches(dtypes, (128_256, 151_665))
    yield from ensemble_launches((2, 3, 5), (8192, 4093))


def logprob_launches(dtypes=(BF16,), sizes=(8192,)):
    """Yield what the loop of `linear_logprob` launches, with and without a bias, a cap, a subset."""
    fold, dlogits = logprob_tile._fold_kernel, logprob_tile._dlogits_kernel
    for dtype, V in product(dtypes, sizes):
        kept = BF16 if dtype.itemsize == 2 else dtype
        words = f"{dtype} {V}".replace("torch.", "")
        for name, p, everything, frozen in (
            ("statistics", None, False, False),
            ("statistics bias subset softcap", None, True, False),
            ("cached", kept, False, False),
            ("cached subset", kept, None, False),
            ("frozen", dtype, False, True),
            ("frozen softcap bias", dtype, True, True),
        ):
            bias, cap = (dtype, 30.0) if everything else (None, None)
            inside = U8 if everything is not False and not frozen else None
            block = triton.next_power_of_2(V)
            arguments = (F32, bias, inside, I64, F32, F32, F32, p, 4096, V, V, 4096, V, 1.0, cap)
            options = {"FROZEN": frozen, "BLOCK_V": block, "num_warps": logprob_tile.fold_warps(block)}
            yield f"fold {name} {words}", fold, arguments, options
        for name, source, everything, cached in (
            ("recompute", F32, False, False),
            ("recompute softcap bias subset", F32, True, False),
            ("cached", kept, False, True),
            ("cached subset", kept, None, True),
        ):
            bias, cap = (dtype, 30.0) if everything else (None, None)
            inside = None if everything is False else U8
            arguments = (source, bias, inside, I64, F32, F32, F32, dtype, 4096, V, V, 4096, V, 1.0, cap)
            options = {"CACHED": cached, "BLOCK_V": logprob_tile.BLOCK_V}
            yield f"dlogits {name} {words}", dlogits, arguments, options


def sorted_launches(dtypes=(BF16,), sizes=(128_256,)):
    """Yield what `sorted_distance` launches."""
    bins = sorted_tile.BINS
    merge = (I64, I64, F32, F32, torch.int8, F32, bins)
    options = {"BLOCK_B": sorted_tile.BLOCK_B, "num_warps": sorted_tile.MERGE_WARPS}
    yield "sorted merge", sorted_tile._merge_kernel, merge, options
    for V in sizes:
        histogram = (F32, F32, F32, F32, I64, V, V, bins, 1.0)
        options = {"BLOCK_V": sorted_tile.HISTOGRAM_BLOCK_V}
        yield f"sorted histogram {V}", sorted_tile._histogram_kernel, histogram, options
        for dtype, cap in product(dtypes, (None, 30.0)):
            words = f"{'' if cap is None else ' softcap'} {dtype} {V}".replace("torch.", "")
            arguments = (F32, F32, F32, F32, F32, F32, torch.int8, dtype, V, V, V, bins, 1.0, cap)
            options = {"BLOCK_V": sorted_tile.BLOCK_V}
            yield f"sorted dlogits{words}", sorted_tile._dlogits_kernel, arguments, options


def projected_launches(dtypes=(BF16,), sizes=(128_256,)):
    """Yield what `projected_divergence` launches."""
    block = projected_divergence.BLOCK
    for V in sizes:
        arguments = (F32, F32, F32, I64, I64, F32, F32, V, V, V, 1.0, 1e-38)
        yield f"projected carry {V}", projected_divergence._carry_kernel, arguments, {"BLOCK_W": block}
        arguments = (F32, F32, F32, V, V, V, 1.0)
        yield f"projected compare {V}", projected_divergence._compare_kernel, arguments, {"BLOCK_W": block}
        for dtype, cap in product(dtypes, (None, 30.0)):
            words = f"{'' if cap is None else ' softcap'} {dtype} {V}".replace("torch.", "")
            arguments = (F32, F32, F32, I64, I64, F32, F32, F32, dtype, V, V, V, V, 1.0, cap)
            yield f"projected pull{words}", projected_divergence._pull_kernel, arguments, {"BLOCK_V": block}


def ensemble_launches(heads=(2,), sizes=(8192,)):
    """Yield what `linear_ensemble` launches beside `fold`."""
    for K, V, is_sum in product(heads, sizes, (False, True)):
        name = f"ensemble combine {'mean' if is_sum else 'max'} {K} heads {V}"
        options = {"K": K, "IS_SUM": is_sum, "BLOCK_V": ensemble_tile.BLOCK_V}
        yield name, ensemble_tile._combine_kernel, (F32, F32, I64, F32, F32, F32, 1024, V), options


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


def chosen(architecture, how):
    """Yield (a launch, whether it comes from the sweep) of one architecture."""
    if how == "--sweep":
        yield from ((launch, True) for launch in sweep(architecture))
        return
    known = fused_launches if how == "--less" and architecture != ALL_FOR else launches
    yield from ((launch, False) for launch in known(architecture))
    if how == "--less" and architecture == ALL_FOR:
        yield from ((launch, True) for launch in islice(sweep(architecture), 0, None, EVERY))


def main():
    how = sys.argv[1] if len(sys.argv) > 1 else "--all"
    records = []
    for architecture in ARCHITECTURES:
        driver.set_active(StubDriver(architecture))
        for (name, kernel, arguments, options), swept in chosen(architecture, how):
            compiled = kernel.warmup(*arguments, grid=(1,), **options)
            about = {"kernel": name, "sm": architecture, "swept": swept}
            records.append(about | resources(compiled))
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()
