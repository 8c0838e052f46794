"""The GEMMs of a loop over vocabulary tiles: sums are float32, whatever the inputs, on every device.

Dimensions: N tokens, V the tile's rows of the head, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.launch import low_dtype
from tokenkit.kernels.logprob_plan import Plan
from tokenkit.kernels.vocabulary import Tile

WIDENS = True
"""GEMMs of 16-bit tensors write float32 sums (`out_dtype`); without, those are rounded to 16 bits between."""


class Work:
    """Buffers that every tile reuses: a fresh allocation of a tile costs a CPU its page faults again."""

    def __init__(self, hidden_ND: Tensor, plan: Plan) -> None:
        self.hidden_ND = hidden_ND
        self.buffers: dict[str, Tensor] = {}
        self.low = low_dtype(hidden_ND, plan.dtype)
        """The dtype in which a tile enters the second GEMM."""
        self.columns = max(tile.end - tile.start for tile in plan.tiles + plan.backward_tiles)

    def tile(self, name: str, tile: Tile, dtype: torch.dtype) -> Tensor:
        """Return [N, the tile's rows], contiguous, uninitialised."""
        N, V = len(self.hidden_ND), tile.end - tile.start
        if name not in self.buffers:
            self.buffers[name] = self.hidden_ND.new_empty(N * self.columns, dtype=dtype)
        return self.buffers[name][: N * V].view(N, V)


def operand(tensor: Tensor, plan: Plan) -> Tensor:
    """Return what a GEMM takes: 16-bit tensors as they are on a GPU, float32 on a CPU (its GEMMs round)."""
    return tensor if tensor.is_cuda else tensor.to(plan.dtype)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left @ right to `out`, which is of the accumulator's dtype."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if not WIDENS:
        return out.copy_(torch.mm(left, right))
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, in its dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif not WIDENS:
        total.add_(torch.mm(left, right))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def write_product(matrix: Tensor, rows: slice | Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right to rows of `matrix`; the sum over tokens is rounded once, when it is written."""
    if isinstance(rows, slice) and left.dtype == matrix.dtype:
        torch.mm(left, right, out=matrix[rows])
    else:
        matrix[rows] = torch.mm(left, right).to(matrix.dtype)
