"""The GEMMs between hidden states and rows of a head: sums are float32, whatever the inputs, on every device.
`Gradients` adds up those of one side while pieces of dz come in.

    z = hidden · weight[rows]ᵀ                    float32, into a buffer that every chunk or tile reuses
    dhidden += dz · weight[rows]                  a row of tokens is complete where all columns were added
    dweight[rows] = or += dzᵀ · hidden            float32 where it adds: a 16-bit sum would drift

Rows of the head may be named by an index instead of all in order; they are then gathered a block at a time.
GEMMs take 16-bit operands on a GPU and write float32; a CPU's GEMMs round, so there they are widened, also a
block at a time.

Dimensions: N tokens, V columns (rows of the head that take part), D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenkit.kernels.head.sharded import reduce_sum

if TYPE_CHECKING:
    from tokenkit.kernels.head.side import Side
    from tokenkit.structs import Head

WIDENS = True
"""GEMMs of 16-bit tensors write float32 sums (`out_dtype`); without, those are rounded to 16 bits between."""

BLOCK_BYTES = 64 * 2**20  # of rows of a head that are gathered or widened at once
CPU_BLOCK_BYTES = 4 * 2**20

Rows = slice | Tensor
"""Rows of a head: a stretch of them, or int64 indices, which may repeat."""


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


def write_product(matrix: Tensor, rows: Rows, left: Tensor, right: Tensor) -> None:
    """Write left @ right to rows of `matrix`; the sum over tokens is rounded once, when it is written."""
    if isinstance(rows, slice) and left.dtype == matrix.dtype:
        torch.mm(left, right, out=matrix[rows])
    else:
        matrix[rows] = torch.mm(left, right).to(matrix.dtype)


def number_of(rows: Rows) -> int:
    """Return how many rows of a head `rows` names."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def part_of(rows: Rows, start: int, end: int) -> Rows:
    """Return the rows from `start` to `end` of those that `rows` names."""
    if isinstance(rows, slice):
        return slice(rows.start + start, rows.start + end)
    return rows[start:end]


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a GEMM takes: a tensor as it is on a GPU, widened to `dtype` on a CPU (its GEMMs round)."""
    return tensor if tensor.is_cuda else tensor.to(dtype)


def blocks(weight_VD: Tensor, rows: Rows, dtype: torch.dtype) -> Iterator[tuple[slice, Rows, Tensor]]:
    """Yield (columns, rows of the head, those rows as a GEMM takes them), as much at once as costs no copy.

    Args:
        weight_VD: the head's weight.
        rows: which rows take part.
        dtype: of the sums: float32 or float64.
    """
    V, D = number_of(rows), weight_VD.shape[1]
    widened = not weight_VD.is_cuda and weight_VD.dtype != dtype
    if isinstance(rows, slice) and not widened:
        if V:
            yield slice(0, V), rows, weight_VD[rows]
        return
    limit = BLOCK_BYTES if weight_VD.is_cuda else CPU_BLOCK_BYTES
    step = max(limit // (D * dtype.itemsize) // 128 * 128, 128)
    for start in range(0, V, step):
        end = min(start + step, V)
        part = part_of(rows, start, end)
        yield slice(start, end), part, operand(weight_VD[part], dtype)


def write_products(hidden_ND: Tensor, weight_VD: Tensor, rows: Rows, z_NV: Tensor) -> None:
    """Write hidden · weight[rows]ᵀ to z_NV: float32 or float64, its columns adjacent."""
    hidden_ND = operand(hidden_ND, z_NV.dtype)
    for columns, _, weight in blocks(weight_VD, rows, z_NV.dtype):
        product(hidden_ND, weight.T, z_NV[:, columns])


def add_hidden_gradient(dz_NV: Tensor, weight_VD: Tensor, rows: Rows, dhidden_ND: Tensor) -> None:
    """Add dz · weight[rows] to dhidden_ND: float32 or float64."""
    dz_NV = operand(dz_NV, dhidden_ND.dtype)
    for columns, _, weight in blocks(weight_VD, rows, dhidden_ND.dtype):
        add_product(dhidden_ND, dz_NV[:, columns], weight)


def write_weight_gradient(dz_NV: Tensor, hidden_ND: Tensor, rows: Rows, dweight_VD: Tensor) -> None:
    """Write dzᵀ · hidden to rows of dweight_VD, of any dtype, rounded once; no row may repeat."""
    dtype = torch.promote_types(dweight_VD.dtype, torch.float32)
    dz_NV, hidden_ND = operand(dz_NV, dtype), operand(hidden_ND, dtype)
    step = max(BLOCK_BYTES // (hidden_ND.shape[1] * dtype.itemsize), 128)
    if isinstance(rows, slice) and dz_NV.dtype == dweight_VD.dtype:
        step = max(number_of(rows), 1)  # written in place: no sums wait to be rounded
    for start in range(0, number_of(rows), step):
        end = min(start + step, number_of(rows))
        write_product(dweight_VD, part_of(rows, start, end), dz_NV[:, start:end].T, hidden_ND)


def add_weight_gradient(dz_NV: Tensor, hidden_ND: Tensor, rows: Rows, dweight_VD: Tensor) -> None:
    """Add dzᵀ · hidden to rows of dweight_VD: float32 or float64; rows that repeat add up."""
    dz_NV, hidden_ND = (operand(tensor, dweight_VD.dtype) for tensor in (dz_NV, hidden_ND))
    if isinstance(rows, slice):
        add_product(dweight_VD[rows], dz_NV.T, hidden_ND)
        return
    step = max(BLOCK_BYTES // (hidden_ND.shape[1] * dweight_VD.dtype.itemsize), 128)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        sums = hidden_ND.new_empty((len(some), hidden_ND.shape[1]), dtype=dweight_VD.dtype)
        product(dz_NV[:, start : start + step].T, hidden_ND, sums)
        add_rows(dweight_VD, some, sums)


def add_rows(total: Tensor, rows: Rows, addend: Tensor) -> None:
    """Add to rows of `total`; rows that repeat add up, in an order that is always the same."""
    if isinstance(rows, slice):
        total[rows] += addend
    elif total.is_cuda:
        total.index_put_((rows,), addend, accumulate=True)  # sorts: no atomics
    else:
        total.index_add_(0, rows, addend)


class Gradients:
    """Sums over pieces: of hidden states and bias float32 (float64), of the weight as `adds` says."""

    def __init__(self, side: Side, needs: str, *, adds: bool = True) -> None:
        """Begin.

        Args:
            side: whose.
            needs: which gradients: x hidden states, w weight, b bias.
            adds: whether a row of dW gets several addends, whose sum must then be float32; otherwise each is
                written once, rounded to the weight's dtype.
        """
        self.side, self.adds = side, adds
        head, dtype = side.head, side.dtype
        self.hidden_ND = self.weight_VD = self.bias_V = None
        if "x" in needs:
            self.hidden_ND = torch.zeros_like(side.hidden_ND, dtype=dtype)
        if "w" in needs:
            self.weight_VD = self._weight(head.weight_VD)
        if "b" in needs and head.bias_V is not None:
            self.bias_V = torch.zeros_like(head.bias_V, dtype=dtype)

    def _weight(self, weight_VD: Tensor) -> Tensor:
        if self.adds or isinstance(self.side.rows, Tensor) or not len(self.side.hidden_ND):
            return torch.zeros_like(weight_VD, dtype=self.side.dtype if self.adds else None)
        dweight_VD = torch.empty_like(weight_VD)
        dweight_VD[self.side.columns :].zero_()  # padding: pieces hold every other row
        return dweight_VD

    def extra_bytes(self) -> int:
        """Return what the sum of dW takes beside the dW that is returned."""
        wider = self.weight_VD is not None and self.weight_VD.dtype != self.side.head.weight_VD.dtype
        return self.weight_VD.nbytes if self.weight_VD is not None and wider else 0

    def add(self, dz_NV: Tensor, rows: Rows, tokens: slice, weight: Tensor | None = None) -> None:
        """Add what dz of some tokens and columns pulls.

        Args:
            dz_NV: of dtype `side.low`, or wider.
            rows: the columns' rows of the head.
            tokens: which.
            weight: these rows as `operand` made them, if they were fetched already.
        """
        side = self.side
        hidden_ND, weight_VD = side.hidden_ND[tokens], side.head.weight_VD
        if self.hidden_ND is not None:
            if weight is None:
                add_hidden_gradient(dz_NV, weight_VD, rows, self.hidden_ND[tokens])
            else:
                add_product(self.hidden_ND[tokens], operand(dz_NV, side.dtype), weight)
        if self.weight_VD is not None:
            if self.adds:
                add_weight_gradient(dz_NV, hidden_ND, rows, self.weight_VD)
            elif weight is None:
                write_weight_gradient(dz_NV, hidden_ND, rows, self.weight_VD)
            else:
                left, right = operand(dz_NV, side.dtype).T, operand(hidden_ND, side.dtype)
                write_product(self.weight_VD, rows, left, right)
        if self.bias_V is not None:
            add_rows(self.bias_V, rows, dz_NV.sum(0, dtype=side.dtype))

    def results(self, head: Head | None = None) -> list[Tensor | None]:
        """Return those of hidden states, weight and bias.

        Args:
            head: by whose shard the columns are divided, over whose processes those of hidden states are
                added up; None: the side's own.
        """
        if self.hidden_ND is not None:
            self.hidden_ND = reduce_sum(self.hidden_ND, head or self.side.head)
        return [self.hidden_ND, self.weight_VD, self.bias_V]
