"""The gradients of one side while pieces of dz come in.

Dimensions: N tokens, V columns, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.head.products import (
    Rows,
    add_hidden_gradient,
    add_product,
    add_rows,
    add_weight_gradient,
    operand,
    write_product,
    write_weight_gradient,
)
from tokenkit.kernels.head.sharded import reduce_sum
from tokenkit.kernels.head.side import Side
from tokenkit.structs import Head


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
