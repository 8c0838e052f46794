"""One model at its head: hidden states, the rows of the head that are columns, and what makes logits of both.

Dimensions: N tokens, V columns, D hidden size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels import deferred
from tokenkit.kernels.head import logits
from tokenkit.kernels.head.products import Rows, number_of, operand, product, write_products
from tokenkit.kernels.head.sharded import local_rows, vocab_size
from tokenkit.kernels.head.tiles import Buffer
from tokenkit.kernels.launch import low_dtype
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.structs import Head


class Side(NamedTuple):
    """One model's part of an operation. Made by `side_of`."""

    name: str
    """Of its hidden states, for messages."""
    hidden_ND: Tensor
    head: Head
    rows: Rows
    """Rows of the head's weight that are columns, of this process."""
    columns: int
    """How many these are."""
    first: int
    """The id of the head's first row that is here."""
    bias_V: Tensor | None
    """Of the columns."""
    alpha: float
    """Scale over temperature."""
    cap: float | None
    """Softcap over temperature."""
    dtype: torch.dtype
    """Of logits and sums: float32, or float64 for float64."""

    @property
    def low(self) -> torch.dtype:
        """The dtype in which dz enters a GEMM."""
        return low_dtype(self.hidden_ND, self.dtype)

    def row_bytes(self) -> int:
        """Return the bytes of a row of logits; the same on every process that shares the head."""
        if self.head.shard is None:
            return self.columns * self.dtype.itemsize
        assert self.head.vocab_size is not None
        return -(-self.head.vocab_size // self.head.shard.group.size()) * self.dtype.itemsize

    def logits(
        self,
        buffer: Buffer,
        tokens: slice,
        rows: Rows | None = None,
        columns: slice | None = None,
    ) -> tuple[Tensor, float]:
        """Return [tokens, columns], in `buffer`, and the factor that is left to their reader.

        Args:
            buffer: its piece of this side's name is overwritten.
            tokens: which.
            rows: the columns' rows of the head; None: all that take part.
            columns: where these stand among them; None: all.
        """
        rows = self.rows if rows is None else rows
        z_NV = buffer.get(self.name, tokens.stop - tokens.start, number_of(rows), self.dtype)
        write_products(self.hidden_ND[tokens], self.head.weight_VD, rows, z_NV)
        bias_V = self.bias_V if self.bias_V is None or columns is None else self.bias_V[columns]
        return z_NV, logits.finish(z_NV, bias_V, self.alpha, self.cap)

    def products(self, z_NV: Tensor, weight: Tensor) -> Tensor:
        """Write hidden · weightᵀ to z_NV, of rows that `operand` made ready."""
        return product(operand(self.hidden_ND, self.dtype), weight.T, z_NV)

    def check_finite(self, lse_N: Tensor, first: int = 0) -> None:
        """Name a row that has no log-sum-exp; a softcap hides infinities, so hidden states are read again.

        Args:
            lse_N: log-sum-exp, or Σ exp(z − max), of some rows.
            first: the first of them.
        """
        hidden_ND = self.hidden_ND[first : first + len(lse_N)]
        finite_N = lse_N.isfinite()
        if self.cap is not None:
            finite_N = finite_N & hidden_ND.isfinite().all(1)

        words = f"{self.name} and its head must be finite"

        def error(row: int) -> NotFiniteError:
            found = f"its log-sum-exp is {lse_N[row].item()}: look at weight_VD and bias_V"
            if not hidden_ND[row].isfinite().all():
                found = "it holds NaN or infinity: look at what the model returned there"
            return NotFiniteError(f"{words}: in row {first + row} {found}")

        deferred.require(finite_N, words, NotFiniteError, error, first)


def side_of(
    name: str, hidden_ND: Tensor, head: Head, temperature: float = 1.0, rows: Rows | None = None
) -> Side:
    """Return one model's side; `rows` None: every row of the head that is here, padding left out."""
    start, end = local_rows(head)
    rows = slice(0, end - start) if rows is None else rows
    return Side(
        name=name,
        hidden_ND=hidden_ND,
        head=head,
        rows=rows,
        columns=number_of(rows),
        first=start,
        bias_V=None if head.bias_V is None else head.bias_V[rows],
        alpha=head.scale / temperature,
        cap=None if head.softcap is None else head.softcap / temperature,
        dtype=torch.promote_types(hidden_ND.dtype, torch.float32),
    )


def check_side(name: str, hidden_ND: Tensor, head: Head, head_name: str = "head") -> None:
    """Raise ValueError if a model's hidden states and head do not fit together.

    Args:
        name: of the hidden states.
        hidden_ND: matrix.
        head: of their dtype and device.
        head_name: what the caller calls it.
    """
    weight_VD = head.weight_VD
    if any(hasattr(x, "device_mesh") for x in (hidden_ND, weight_VD)):
        raise ValueError(
            f"plain tensors are taken, and {name} or {head_name}.weight_VD is a DTensor: call the operation "
            "inside the forward of the sharded module that owns the head"
        )
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"{name} and {head_name}.weight_VD must be matrices that share their last dimension: "
            f"got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if not hidden_ND.is_floating_point():
        raise ValueError(f"{name} must be floating point: got {hidden_ND.dtype}")
    for part, x in (("weight_VD", weight_VD), ("bias_V", head.bias_V)):
        if x is not None and x.dtype != hidden_ND.dtype:
            raise ValueError(
                f"{name} is {hidden_ND.dtype} but {head_name}.{part} is {x.dtype}: "
                "cast the head once, when the model is loaded"
            )
        if x is not None and x.device != hidden_ND.device:
            raise ValueError(
                f"{name} is on {hidden_ND.device} but {head_name}.{part} on {x.device}: "
                "move the head to its hidden states"
            )
    _check_head(head, head_name)


def check_hidden(name: str, hidden_ND: Tensor) -> None:
    """Name the row of hidden states that holds NaN or infinity. A compiler's graph leaves it out."""
    words = f"{name} must be finite"

    def error(row: int) -> NotFiniteError:
        return NotFiniteError(f"{words}: row {row} holds NaN or infinity")

    deferred.require(torch.isfinite(hidden_ND).all(1), words, NotFiniteError, error)


def check_row_weight(row_weight_N: Tensor, student_ND: Tensor) -> None:
    """Raise ValueError if weights of rows do not fit them, or want a gradient."""
    if row_weight_N.shape != student_ND.shape[:1] or row_weight_N.device != student_ND.device:
        raise ValueError(
            f"row_weight_N must hold one number per row of student_ND ({len(student_ND)}), on "
            f"{student_ND.device}: got shape {tuple(row_weight_N.shape)} on {row_weight_N.device}"
        )
    if row_weight_N.requires_grad:
        raise ValueError("row_weight_N must not require a gradient, none is formed: detach it")


def _check_head(head: Head, name: str) -> None:
    """Raise ValueError if a part of the head does not fit its weight, or a number is out of its range."""
    rows = head.weight_VD.shape[0]
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(f"{name}.softcap must be positive and finite, or None: got {head.softcap}")
    if not math.isfinite(head.scale):
        raise ValueError(f"{name}.scale must be finite: got {head.scale}")
    if head.bias_V is not None and head.bias_V.shape != (rows,):
        raise ValueError(
            f"{name}.bias_V must hold one number per row of weight_VD ({rows}): "
            f"got shape {tuple(head.bias_V.shape)}"
        )
    if head.shard is not None:
        if head.vocab_size is None or head.vocab_size < 1:
            raise ValueError(
                f"{name}.vocab_size must be the number of ids of the whole head, because this process holds "
                f"a shard of its rows: got {head.vocab_size}"
            )
        if head.shard.start < 0:
            raise ValueError(f"{name}.shard.start must be an id of at least 0: got {head.shard.start}")
    elif not 0 < vocab_size(head) <= rows:
        raise ValueError(
            f"{name}.vocab_size must be in [1, {rows}], the rows of weight_VD: got {vocab_size(head)}"
        )
