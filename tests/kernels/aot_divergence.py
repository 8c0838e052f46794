"""What `linear_divergence` launches, for tests/kernels/aot.py."""

import torch

from tokenkit.kernels import adaptive_weight, divergence_tile
from tokenkit.kernels.divergence_terms import MIRROR
from tokenkit.kernels.kinds import KINDS

F32, BF16 = torch.float32, torch.bfloat16


def divergence_launches():
    """Yield every kind, with all that a head and repeated ids may ask for."""
    block, V, N = {"BLOCK_V": divergence_tile.BLOCK_V}, 128_256, 1024
    flags = block | {"HAS_BIAS": True, "HAS_CAP": True}
    yield "divergence finish", divergence_tile._finish_kernel, (F32, BF16, V, V, 1.0, 1.0), flags
    for name, share in (("", None), (" share", F32)):
        arguments, flags = (F32, share, F32, F32, V, V, 1.0), block | {"HAS_SHARE": share is not None}
        yield f"divergence row_sums{name}", divergence_tile._row_sums_kernel, arguments, flags
    for kind in KINDS:
        flags = {"KIND": kind, "MIRROR": MIRROR.get(kind, kind), "num_warps": divergence_tile.SUM_WARPS}
        arguments = (F32, F32, F32, F32, F32, F32, V, V, N, V, 1.0, 1.0, 0.1)
        yield f"divergence sums {kind}", divergence_tile._divergence_sums_kernel, arguments, block | flags
        flags = block | {"KIND": kind, "HAS_CAP": True, "HAS_SHARE": True}
        arguments = (F32, F32, F32, F32, BF16, V, V, V, N, V, 1.0, 1.0, 0.1, 1.0)
        yield f"divergence gradient {kind}", divergence_tile._gradient_kernel, arguments, flags
    arguments, flags = (F32, F32, F32, BF16, V, V, V, 1.0, 1.0), block | {"HAS_CAP": True}
    yield "divergence rest_gradient", divergence_tile._rest_gradient_kernel, arguments, flags
    for name, with_gaps in (("", False), (" gaps", True)):
        arguments = (F32, F32, F32, F32, F32, F32, F32, V, V, N, V, 1.0, 1.0)
        flags = {"WITH_GAPS": with_gaps, "num_warps": adaptive_weight.WARPS}
        flags["BLOCK_V"] = adaptive_weight.BLOCK_V
        yield f"divergence below{name}", adaptive_weight._below_kernel, arguments, flags
