"""The launches of product keys and tiny experts, as `aot.py` compiles them: the guide's sizes."""

import torch

from tokenkit.kernels import peer_experts, product_key_topk, table_rows

F32, BF16, I32, I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
D, P = 768, 128


def peer_launches():
    """Yield (name, kernel, positional arguments, keyword arguments)."""
    two, three = (1024, 1024), (100, 100, 100)
    for dtype, picks, sizes in ((BF16, 16, two), (BF16, 32, two), (BF16, 8, three), (F32, 16, two)):
        bits = 8 * dtype.itemsize
        arguments = (dtype, dtype, I32, I32, F32, I32, 32768, 8, 128, picks)
        options = {"SIZES": sizes, "SHARED": True, **product_key_topk.blocks(picks, 128, bits)}
        name = f"peer pick {picks} of {len(sizes)} parts, {bits} bits"
        yield name, product_key_topk._pick_kernel, arguments, options
    for M in (1, 4):
        options = {"M": M, "ACTIVATION": "gelu", **peer_experts._sizes(D)}
        forward = (BF16, BF16, BF16, I32, F32, BF16, F32, P * M, D)
        yield f"peer forward {M}", peer_experts._forward_kernel, forward, options
        backward = (BF16, BF16, BF16, I32, F32, F32, BF16, F32, F32, F32, P * M, D)
        yield f"peer backward {M}", peer_experts._backward_kernel, backward, options
    wide = {"M": 1, "ACTIVATION": "silu", **peer_experts._sizes(4096)}
    forward = (BF16, BF16, BF16, I32, F32, BF16, F32, P, 4096)
    yield "peer forward wide", peer_experts._forward_kernel, forward, wide
    columns = table_rows.block_of(D)
    sizes = {"BLOCK_D": columns, "num_warps": table_rows.warps_of(columns)}
    block = {"BLOCK_P": table_rows.BLOCK_P, "STRETCH": table_rows.STRETCH, **sizes}
    yield "peer segments", table_rows._segment_kernel, (BF16, F32, I64, I64, BF16, P, D), block
    stretch = (BF16, F32, I32, I64, I64, F32, 4194304, P, D)
    yield "peer stretches", table_rows._stretch_kernel, stretch, block
    join = {"STRETCH": table_rows.STRETCH, **sizes}
    yield "peer join", table_rows._join_kernel, (I32, I64, F32, BF16, 4194304, D), join
    rows = {"BLOCK_R": table_rows.BLOCK_P, "BLOCK_D": 128, "num_warps": 1}
    yield "peer rows", table_rows._weighted_rows_kernel, (BF16, I32, F32, BF16, 16, 128), rows
