"""`linear_logprob` without a workspace: a tile of z stays in registers, from hidden states to sums.

    statistics   a program holds a block of tokens and walks a stretch of the vocabulary: running maximum and
                 sum of both parts, the target's z; stretches are joined afterwards       2·N·V·D
    frozen       the same, one part to a stretch, and Σ exp(z − m) W as in flash attention; D ≤ 256   4·N·V·D
    gradient     a program owns a block of dX (or dW) of `CHUNK` channels, walks the whole vocabulary (or all
                 tokens), builds z and dz again and adds dz · W (or dzᵀ · X) in registers; D ≤ 1024
                 (4 to 6)·N·V·D each: z is built once for every chunk

No atomics: every number is written by one program. Beyond these D the accumulators leave the registers, and
the loop with its narrowest tile (6·128·N bytes) is faster: `takes` says so. From sm_90 on tiles come through
tensor descriptors (TMA); `frozen` reads rows of a subset by index, hence with plain loads.

Dimensions: N tokens, V rows of the head, D hidden size, S stretches, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head.products import Gradients
from tokenkit.kernels.language import triton
from tokenkit.kernels.launch import on_device, runs_triton
from tokenkit.kernels.linear_logprob import plan as plans
from tokenkit.kernels.linear_logprob.plan import REST, SUBSET, Plan, Sums
from tokenkit.kernels.linear_logprob.programs import _frozen_kernel, _gradient_kernel, _statistics_kernel

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

PARTIAL_BYTES = 16 * 2**20  # of what stretches leave to be joined
TMA_ARCHITECTURE = 90  # the first whose copy engine takes descriptors
FROZEN_CHANNELS = 256
GRADIENT_CHANNELS = 1024


class Blocks(NamedTuple):
    """How a kernel is cut: a tile of z, channels of one step of its product, and the launch."""

    tokens: int
    rows: int
    step: int
    warps: int
    stages: int
    chunk: int = 0
    """Channels that one program accumulates."""
    tma: bool = False
    """Tiles come through descriptors."""


BLOCKS = {
    "statistics 16": {
        80: Blocks(128, 64, 64, 8, 3),
        90: Blocks(128, 128, 64, 8, 4),
        100: Blocks(128, 64, 64, 8, 4),
    },
    "statistics 32": {80: Blocks(64, 64, 32, 8, 2)},
    "frozen 16": {80: Blocks(64, 64, 64, 8, 2)},
    "frozen 32": {80: Blocks(32, 32, 32, 8, 1)},
    "gradient 16": {80: Blocks(64, 64, 64, 8, 2, 256), 90: Blocks(64, 64, 64, 8, 3, 512)},
    "gradient 32": {80: Blocks(32, 32, 32, 8, 2, 256)},
}
"""By kernel and bits of the inputs, then by the least architecture; chosen to compile without spilling."""


def takes(plan: Plan, *, backward: bool = False) -> bool:
    """Say whether these kernels run: there is no room for the loop's narrowest tile, and the shapes fit."""
    hidden_ND, weight_VD = plan.side.hidden_ND, plan.side.head.weight_VD
    N, D = hidden_ND.shape
    if plan.mode == "cached" or plan.workspace_bytes >= N * plans.COLUMNS[0] * 4:
        return False
    if (plan.mode == "frozen" and D > FROZEN_CHANNELS) or (backward and D > GRADIENT_CHANNELS):
        return False  # the sums would leave the registers
    return runs_triton(hidden_ND) and _fits_descriptor(hidden_ND) and _fits_descriptor(weight_VD)


def _fits_descriptor(x_ND: Tensor) -> bool:
    """The copy engine takes rows without gaps between channels, that begin at multiples of 16 bytes."""
    return x_ND.is_contiguous() and x_ND.data_ptr() % 16 == 0 and x_ND.shape[1] * x_ND.itemsize % 16 == 0


def forward(plan: Plan, sums: Sums, kept: Tensor) -> None:
    """Write `sums`, and in mode `frozen` the means `kept` [parts, N, D], of every row of the head."""
    if plan.mode == "frozen":
        _frozen(plan, sums, kept)
        return
    hidden_ND = plan.side.hidden_ND
    N, D = hidden_ND.shape
    cut = blocks("statistics", hidden_ND)
    programs = triton.cdiv(N, cut.tokens)
    S, stretch = _stretches(plan.rows, cut.rows, programs, PARTIAL_BYTES // (16 * N), hidden_ND)
    max_SPN = hidden_ND.new_empty((S, 2, N), dtype=plan.dtype)
    sum_SPN = torch.empty_like(max_SPN)
    with on_device(hidden_ND):
        _statistics_kernel[(programs, S)](
            *_operands(plan, cut),
            plan.side.bias_V, plan.inside_V, plan.row_N, max_SPN, sum_SPN, sums.z_target_N,
            N, plan.rows, D, stretch,
            plan.side.alpha, plan.side.cap,
            TMA=cut.tma, BLOCK_N=cut.tokens, BLOCK_V=cut.rows, BLOCK_D=cut.step,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    _join(max_SPN, sum_SPN, sums.max_PN, sums.sum_PN)


def _frozen(plan: Plan, sums: Sums, mean_PND: Tensor) -> None:
    hidden_ND, head = plan.side.hidden_ND, plan.side.head
    N, D = hidden_ND.shape
    cut = blocks("frozen", hidden_ND)
    programs = triton.cdiv(N, cut.tokens)
    subset_size = 0 if plan.subset is None else plan.subset.size
    for part, start, end in ((SUBSET, 0, subset_size), (REST, subset_size, plan.rows)):
        if start == end:
            continue
        most = PARTIAL_BYTES // (4 * N * D)
        S, stretch = _stretches(end - start, cut.rows, programs, most, hidden_ND)
        max_SN = sums.max_PN[part : part + 1] if S == 1 else hidden_ND.new_empty((S, N), dtype=plan.dtype)
        sum_SN = sums.sum_PN[part : part + 1] if S == 1 else torch.empty_like(max_SN)
        mean_SND = mean_PND[part : part + 1] if S == 1 else hidden_ND.new_empty((S, N, D), dtype=plan.dtype)
        with on_device(hidden_ND):
            _frozen_kernel[(programs, S)](
                hidden_ND, head.weight_VD, None if plan.subset is None else plan.subset.order_V, head.bias_V,
                plan.place_N, max_SN, sum_SN, sums.z_target_N, mean_SND,
                start, end, N, D, stretch,
                plan.side.alpha, plan.side.cap,
                BLOCK_N=cut.tokens, BLOCK_V=cut.rows,
                BLOCK_D=max(triton.next_power_of_2(D), 16),
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip
        if S > 1:
            shrink_SN = _join(max_SN, sum_SN, sums.max_PN[part], sums.sum_PN[part])
            torch.sum(mean_SND.mul_(shrink_SN[..., None]), 0, out=mean_PND[part])


def backward(rows: tuple[Tensor, Tensor, Tensor], plan: Plan, gradients: Gradients) -> None:
    """Write the gradients of hidden (float32), weight and bias; the arguments are those of the loop."""
    hidden_ND, weight_VD = plan.side.hidden_ND, plan.side.head.weight_VD
    dbias_V = gradients.bias_V
    N, D = hidden_ND.shape
    cut = blocks("gradient", hidden_ND)
    chunk = min(cut.chunk, max(triton.next_power_of_2(D), 16))
    max_PN = rows[0].where(rows[0] > -torch.inf, 0)  # of a part without ids, whose factor is 0
    numbers_5N = torch.cat([max_PN, rows[1], rows[2][None]])
    for owns_tokens, out in ((True, gradients.hidden_ND), (False, gradients.weight_VD)):
        if out is None and (owns_tokens or dbias_V is None):
            continue
        own, block = (N, cut.tokens) if owns_tokens else (plan.rows, cut.rows)
        other = (
            _rows(weight_VD, plan.rows, cut.rows, chunk, cut.tma)
            if owns_tokens
            else _rows(hidden_ND, N, cut.tokens, chunk, cut.tma)
        )
        with on_device(hidden_ND):
            _gradient_kernel[(triton.cdiv(own, block), triton.cdiv(D, chunk))](
                *_operands(plan, cut), other,
                plan.side.bias_V, plan.inside_V, plan.row_N, numbers_5N, out,
                None if owns_tokens else dbias_V,
                N, plan.rows, D,
                plan.side.alpha, plan.side.cap,
                OWNS_TOKENS=owns_tokens, TMA=cut.tma,
                BLOCK_N=cut.tokens, BLOCK_V=cut.rows, BLOCK_D=cut.step, CHUNK=chunk,
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip


def blocks(kernel: str, hidden_ND: Tensor) -> Blocks:
    """Return how `kernel` is cut for these hidden states, on their device."""
    return blocks_of(kernel, hidden_ND.dtype, _architecture(hidden_ND))


def blocks_of(kernel: str, dtype: torch.dtype, architecture: int) -> Blocks:
    """Return how `kernel` is cut for inputs of `dtype` on an architecture (80, 90, ...)."""
    table = BLOCKS[f"{kernel} {8 * dtype.itemsize}"]
    cut = table[max(least for least in table if least <= max(architecture, 80))]
    return cut._replace(tma=architecture >= TMA_ARCHITECTURE)


def _architecture(hidden_ND: Tensor) -> int:
    return 10 * torch.cuda.get_device_capability(hidden_ND.device)[0] if hidden_ND.is_cuda else 80


def _operands(plan: Plan, cut: Blocks) -> tuple[Tensor | TensorDescriptor, ...]:
    """Return what a tile of z is the product of."""
    hidden_ND, weight_VD = plan.side.hidden_ND, plan.side.head.weight_VD
    hidden = _rows(hidden_ND, len(hidden_ND), cut.tokens, cut.step, cut.tma)
    return hidden, _rows(weight_VD, plan.rows, cut.rows, cut.step, cut.tma)


def _rows(
    x_ND: Tensor, rows: int, block_rows: int, block_channels: int, tma: bool
) -> Tensor | TensorDescriptor:
    """Describe the first rows of a matrix, of which blocks will be read; what lies behind them is 0."""
    D = x_ND.shape[1]
    if not tma:
        return x_ND
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x_ND, [rows, D], [D, 1], [block_rows, block_channels])


def _stretches(rows: int, block: int, programs: int, most: int, hidden_ND: Tensor) -> tuple[int, int]:
    """Return into how many stretches `rows` are cut, and their length: so that processors end together."""
    processors = 4
    if hidden_ND.is_cuda:
        processors = torch.cuda.get_device_properties(hidden_ND.device).multi_processor_count
    steps = triton.cdiv(rows, block)
    counts = range(1, max(1, min(most, steps, processors)) + 1)
    S = min(counts, key=lambda count: triton.cdiv(programs * count, processors) * triton.cdiv(steps, count))
    return S, triton.cdiv(steps, S) * block


def _join(max_SPN: Tensor, sum_SPN: Tensor, max_PN: Tensor, sum_PN: Tensor) -> Tensor:
    """Write the maximum and sum over stretches; return exp(max of a stretch - max), 0 of an empty one."""
    torch.amax(max_SPN, 0, out=max_PN)
    shrink_SPN = torch.where(max_SPN == -torch.inf, 0, torch.exp(max_SPN - max_PN))
    torch.sum(sum_SPN * shrink_SPN, 0, out=sum_PN)
    return shrink_SPN
