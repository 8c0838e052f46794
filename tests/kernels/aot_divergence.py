"""What `linear_divergence` launches, for tests/kernels/aot.py."""

import torch

from tokenkit.kernels.head import logits
from tokenkit.kernels.kinds import KINDS, MIRROR
from tokenkit.kernels.linear_divergence import adaptive_weight, tile

F32, BF16 = torch.float32, torch.bfloat16


def divergence_launches(dtypes=(BF16,), sizes=(128_256,)):
    """Yield every kind, with all that a head and repeated ids may ask for; in a sweep also without."""
    block, N, whole = {"BLOCK_V": tile.BLOCK_V}, 1024, len(sizes) > 1
    for V in sizes:
        for dtype in dtypes:
            yield f"head finish {dtype} {V}", logits._finish_kernel, (F32, dtype, V, V, 1.0, 1.0), block
        for name, share in (("", None), (" share", F32)):
            arguments = (F32, share, F32, F32, V, V, 1.0)
            yield f"head row_sums{name} {V}", logits._row_sums_kernel, arguments, block
        for kind in KINDS:
            for mirror in (MIRROR.get(kind, kind), None) if whole else (MIRROR.get(kind, kind),):
                flags = {"KIND": kind, "MIRROR": mirror, "num_warps": tile.SUM_WARPS}
                arguments = (F32, F32, F32, F32, F32, F32, V, V, N, V, 1.0, 1.0, 0.1)
                yield f"divergence sums {kind} {V}", tile._divergence_sums_kernel, arguments, block | flags
            for dtype in dtypes:
                for cap, share in ((1.0, F32), (None, None)) if whole else ((1.0, F32),):
                    arguments = (F32, F32, F32, share, dtype, V, V, V, N, V, 1.0, 1.0, 0.1, cap)
                    name = f"divergence gradient {kind} {dtype} {V}"
                    yield name, tile._gradient_kernel, arguments, block | {"KIND": kind}
        for dtype in dtypes:
            arguments = (F32, F32, F32, dtype, V, V, V, 1.0, 1.0)
            yield f"divergence rest_gradient {dtype} {V}", tile._rest_gradient_kernel, arguments, block
        for name, with_gaps in (("", False), (" gaps", True)):
            arguments = (F32, F32, F32, F32, F32, F32, F32, V, V, N, V, 1.0, 1.0)
            flags = {"WITH_GAPS": with_gaps, "num_warps": adaptive_weight.WARPS}
            flags["BLOCK_V"] = adaptive_weight.BLOCK_V
            yield f"divergence below{name} {V}", adaptive_weight._below_kernel, arguments, flags
