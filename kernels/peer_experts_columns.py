"""`peer_experts` over tables whose columns are cut over ranks: each has some columns of every expert.

    to columns: x of all ranks' tokens, of my columns; their experts and gates        all-to-all, all-gather
    s partial over my columns -> whole                                                all-reduce
    y of my columns -> each rank's own tokens, all columns                            all-to-all
    backward: dy to columns, c = up · dy -> whole, dx back; the tables' gradients stay where they are

So tables of gigabytes never travel, and every rank does the same work however uneven the use of experts is.
The sums over columns differ from those of one rank by rounding. Every rank must call this as often as the
others, forward and backward; ranks may have different numbers of tokens.

Dimensions: N tokens of this rank, A of all ranks, P experts of a token, E experts, M neurons, D width,
C = D / ranks columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.kernels.kinds import ACTIVATIONS
from tokenkit.kernels.launch import refuse_forward_mode
from tokenkit.kernels.peer_experts import gradients_by_rows, sums_by_rows, table_gradient
from tokenkit.kernels.table_rows import ordered, sum_dtype


class _Exchange:
    """Moves tokens between "mine, all columns" and "everyone's, my columns"."""

    def __init__(self, N: int, group: dist.ProcessGroup):
        self.group, self.ranks, self.N = group, group.size(), N
        # plain numbers travel over the CPU: nothing waits for a GPU
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(sizes, torch.tensor([N]), group=group)
        self.sizes = [int(size) for size in sizes]

    def to_columns(self, hidden_ND: Tensor) -> Tensor:
        """Return my columns of every rank's tokens, [A, C]."""
        parts_RC = hidden_ND.unflatten(1, (self.ranks, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        out_AC = parts_RC.new_empty((sum(self.sizes), parts_RC.shape[1]))
        dist.all_to_all_single(out_AC, parts_RC, self.sizes, [self.N] * self.ranks, group=self.group)
        return out_AC

    def to_rows(self, columns_AC: Tensor) -> Tensor:
        """Return all columns of this rank's tokens, [N, D]."""
        parts_RC = columns_AC.new_empty((self.ranks * self.N, columns_AC.shape[1]))
        dist.all_to_all_single(
            parts_RC, columns_AC.contiguous(), [self.N] * self.ranks, self.sizes, group=self.group
        )
        return parts_RC.unflatten(0, (self.ranks, self.N)).transpose(0, 1).flatten(1)

    def gather(self, mine_NP: Tensor) -> Tensor:
        """Return every rank's rows, [A, P]."""
        most = max(self.sizes)
        padded = torch.nn.functional.pad(mine_NP, (0, 0, 0, most - self.N)).contiguous()
        all_P = padded.new_empty((self.ranks * most, padded.shape[1]))
        dist.all_gather_into_tensor(all_P, padded, group=self.group)
        if min(self.sizes) == most:
            return all_P
        return torch.cat([part[:size] for part, size in zip(all_P.split(most), self.sizes, strict=True)])

    def add(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks; the argument is overwritten."""
        partial = partial.contiguous()
        dist.all_reduce(partial, group=self.group)
        return partial

    def mine(self, all_A: Tensor) -> Tensor:
        """Return the rows of this rank's tokens."""
        return all_A.split(self.sizes)[self.group.rank()]


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor,
        activation: str, group: dist.ProcessGroup,
    ) -> Tensor:  # fmt: skip
        exchange = _Exchange(len(hidden), group)
        x_AC, expert_AP = exchange.to_columns(hidden), exchange.gather(expert)
        gate_AP = exchange.gather(gate)
        tables = down.to(hidden.dtype), up.to(hidden.dtype)
        y_AC, s = sums_by_rows(x_AC, *tables, expert_AP, gate_AP, activation, exchange.add)
        ctx.save_for_backward(x_AC, down, up, expert_AP, gate_AP, s)
        ctx.exchange, ctx.activation = exchange, activation
        return exchange.to_rows(y_AC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x_AC, down, up, expert_AP, gate_AP, s = ctx.saved_tensors
        exchange: _Exchange = ctx.exchange
        dy_AC = exchange.to_columns(dout)
        tables = down.to(dout.dtype), up.to(dout.dtype)
        dx_AC, dgate, ds, factor = gradients_by_rows(
            dy_AC, *tables, expert_AP, gate_AP, s, ctx.activation, complete=exchange.add
        )
        dhidden = exchange.to_rows(dx_AC).to(dout.dtype)
        dgate_NP = exchange.mine(dgate.sum(-1))
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return dhidden, None, None, None, dgate_NP, None, None
        pairs = ordered(expert_AP, len(down))
        ddown, dup = table_gradient(x_AC, ds, pairs, down), table_gradient(dy_AC, factor, pairs, up)
        return dhidden, ddown, dup, None, dgate_NP, None, None


@torch.compiler.disable
def peer_experts_columns(
    hidden_ND: Tensor,
    down_EMC: Tensor,
    up_EMC: Tensor,
    expert_NP: Tensor,
    gate_NP: Tensor,
    activation: str = "gelu",
    *,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return [N, D], the sum of each of this rank's tokens' experts; as `peer_experts`, in all gradients.

    Args:
        hidden_ND: this rank's tokens; the tables are multiplied in their dtype.
        down_EMC: of what each neuron reads with, the columns r·C to (r+1)·C of rank r. Its gradient is the
            sum over the tokens of all ranks, in its own dtype.
        up_EMC: of what each neuron writes, the same columns.
        expert_NP: int32 or int64 ids in [0, E).
        gate_NP: factor of each expert, float32 (float64 of float64).
        activation: one of `ACTIVATIONS`.
        group: the ranks, in the order of the columns; it must move CPU tensors too.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown activation.
    """
    refuse_forward_mode(hidden_ND, down_EMC, up_EMC, gate_NP)
    (N, D), ranks = hidden_ND.shape, group.size()
    if down_EMC.ndim != 3 or down_EMC.shape != up_EMC.shape or down_EMC.shape[2] * ranks != D:
        raise ValueError(
            f"expected two tables [E, M, {D} / {ranks}] of hidden states [{N}, {D}] over {ranks} ranks: got "
            f"{tuple(down_EMC.shape)} and {tuple(up_EMC.shape)}"
        )
    if expert_NP.shape != gate_NP.shape or expert_NP.shape[:1] != (N,) or expert_NP.ndim != 2:
        raise ValueError(
            f"ids and gates must both be [{N}, P]: got {tuple(expert_NP.shape)} and {tuple(gate_NP.shape)}"
        )
    if gate_NP.dtype != sum_dtype(hidden_ND) or expert_NP.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"gates must be {sum_dtype(hidden_ND)} and ids int32 or int64: got {gate_NP.dtype} and "
            f"{expert_NP.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    out_ND: Tensor = _Columns.apply(hidden_ND, down_EMC, up_EMC, expert_NP, gate_NP, activation, group)
    return out_ND
