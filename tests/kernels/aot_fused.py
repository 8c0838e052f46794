"""The launches of `linear_logprob/fused.py` for `aot.py`."""

import torch

from tokenkit.kernels.linear_logprob import fused, programs

F32, BF16, I64, U8 = torch.float32, torch.bfloat16, torch.int64, torch.uint8
SIZE = 4096  # of tokens, vocabulary, and of a stretch


def fused_launches(architecture):
    """Yield (name, kernel, positional arguments, keyword arguments), as the launchers pass them."""
    for dtype in (BF16, F32):
        yield from launches(architecture, dtype)


def launches(architecture, dtype, everything=True):
    """The same for one dtype; with bias, subset and softcap more registers are in use than without."""
    words = f"{8 * dtype.itemsize}" + (" softcap bias subset" if everything else "")
    bias, mask, order, cap = (dtype, U8, I64, 30.0) if everything else (None, None, None, None)
    numbers = (1.0, cap)

    def cut_for(kernel):
        cut = fused.blocks_of(kernel, dtype, architecture)
        options = {"BLOCK_N": cut.tokens, "BLOCK_V": cut.rows, "BLOCK_D": cut.step}
        return cut, options | {"num_warps": cut.warps, "num_stages": cut.stages}

    def matrix(rows, channels):
        if architecture < fused.TMA_ARCHITECTURE:
            return dtype
        return fused._rows(torch.empty(1, 1024, dtype=dtype), SIZE, rows, channels, True)

    cut, options = cut_for("statistics")
    operands = matrix(cut.tokens, cut.step), matrix(cut.rows, cut.step)
    arguments = (*operands, bias, mask, I64, F32, F32, F32, SIZE, SIZE, 1024, SIZE, *numbers)
    yield f"fused statistics {words}", programs._statistics_kernel, arguments, options | {"TMA": cut.tma}
    cut, options = cut_for("frozen")
    D = fused.FROZEN_CHANNELS
    arguments = (dtype, dtype, order, bias, I64, F32, F32, F32, F32, 16, SIZE, SIZE, D, SIZE, *numbers)
    yield f"fused frozen {words}", programs._frozen_kernel, arguments, options | {"BLOCK_D": D}
    for owns_tokens, out, dbias in ((True, F32, None), (False, dtype, bias)):
        cut, options = cut_for("gradient")
        other = matrix(cut.rows if owns_tokens else cut.tokens, cut.chunk)
        operands = matrix(cut.tokens, cut.step), matrix(cut.rows, cut.step), other
        arguments = (*operands, bias, mask, I64, F32, out, dbias, SIZE, SIZE, 1024, *numbers)
        options |= {"OWNS_TOKENS": owns_tokens, "CHUNK": cut.chunk, "TMA": cut.tma}
        side = "dX" if owns_tokens else "dW"
        yield f"fused gradient {side} {words}", programs._gradient_kernel, arguments, options
