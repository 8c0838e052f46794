"""A layer of many tiny experts, of which every token takes a few: PEER, arXiv:2407.04153.

    s_npm = down[e_np, m] · x_n                 e_np: the p-th expert of token n, M neurons each
    y_n   = Σ_p g_np Σ_m act(s_npm) up[e_np, m]

Backward, with c_npm = up[e_np, m] · dy_n and f = act(s):

    dg_np = Σ_m c_npm f_npm        ds_npm = c_npm g_np act'(s_npm)        dx_n = Σ_pm ds_npm down[e_np, m]
    ddown[e, m] = Σ_{(n,p): e_np = e} ds_npm x_n              dup[e, m] = Σ_{(n,p): e_np = e} g_np f_npm dy_n

Of the forward s alone is kept: 4·M bytes per pair, where a gather keeps 4·M·D. Memory traffic decides: each
direction over tokens reads two rows of D numbers per pair and neuron. The gradients of the tables are sums
over the pairs in the order of their experts (`table_rows.py`), so no atomics, and the same bits every time;
they are dense.

Dimensions: N tokens, P experts of a token (heads and picks together), E experts, M neurons, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.kernels.kinds import ACTIVATIONS
from tokenkit.kernels.launch import refuse_forward_mode
from tokenkit.kernels.table_rows import Pairs, ordered, row_dots, segment_sums, sum_dtype, weighted_rows


def _activate(s: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return act(s) and act'(s)."""
    if activation == "relu":
        return s.relu(), (s > 0).to(s.dtype)
    if activation == "silu":
        z = s.sigmoid()
        return s * z, z + s * z * (1 - z)
    assert activation == "gelu"
    normal = 0.5 * (1 + torch.erf(s * 0.5**0.5))
    return s * normal, normal + s * torch.exp(-0.5 * s * s) * 0.3989422804014327


def _neurons(expert_NP: Tensor, M: int) -> Tensor:
    """Return the row of each neuron in a table of E·M rows, [N, P·M]."""
    if M == 1:
        return expert_NP
    neuron_M = torch.arange(M, device=expert_NP.device, dtype=expert_NP.dtype)
    return (expert_NP[..., None] * M + neuron_M).flatten(1)


@torch.library.custom_op("tokenkit::peer_experts", mutates_args=())
def _experts(
    hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y [N, D] and s [N, P, M]."""
    M = down.shape[1]
    row_NR = _neurons(expert, M)
    s = row_dots(hidden, down.flatten(0, 1), row_NR).unflatten(1, (-1, M))
    weight_NR = (_activate(s, activation)[0] * gate[..., None]).flatten(1)
    return weighted_rows(up.flatten(0, 1), row_NR, weight_NR).to(hidden.dtype), s


@_experts.register_fake
def _(
    hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    s = down.new_empty((*expert.shape, down.shape[1]), dtype=sum_dtype(down))
    return hidden.new_empty(hidden.shape), s


@torch.library.custom_op("tokenkit::peer_experts_backward", mutates_args=())
def _experts_backward(
    dout: Tensor, hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, s: Tensor,
    *, activation: str, needs_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden, gate, down and up; of the tables empty ones where nobody asks."""
    E, M = down.shape[:2]
    row_NR = _neurons(expert, M)
    c = row_dots(dout, up.flatten(0, 1), row_NR).unflatten(1, (-1, M))
    f, slope = _activate(s, activation)
    dgate, ds = (c * f).sum(-1), c * slope * gate[..., None]
    dhidden = weighted_rows(down.flatten(0, 1), row_NR, ds.flatten(1)).to(hidden.dtype)
    if not needs_tables:
        return dhidden, dgate, down.new_empty(0), up.new_empty(0)
    pairs, factor = ordered(expert, E), f * gate[..., None]
    ddown, dup = _table_gradient(hidden, ds, pairs, down), _table_gradient(dout, factor, pairs, up)
    return dhidden, dgate, ddown, dup


def _table_gradient(hidden_ND: Tensor, factor_NPM: Tensor, pairs: Pairs, table_EMD: Tensor) -> Tensor:
    """Return Σ factor · hidden over the pairs of each expert and neuron, [E, M, D]."""
    factors = factor_NPM.unbind(-1)
    if len(factors) == 1:
        return segment_sums(hidden_ND, factors[0], pairs, table_EMD.dtype)[:, None]
    gradient_EMD = torch.empty_like(table_EMD)
    for m, factor_NP in enumerate(factors):
        gradient_EMD[:, m] = segment_sums(hidden_ND, factor_NP, pairs, table_EMD.dtype)
    return gradient_EMD


@_experts_backward.register_fake
def _(
    dout: Tensor, hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, s: Tensor,
    *, activation: str, needs_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = down.shape if needs_tables else (0,)
    dhidden, dgate = hidden.new_empty(hidden.shape), gate.new_empty(gate.shape)
    return dhidden, dgate, down.new_empty(shape), up.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.activation = inputs[5]
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs_tables = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dhidden, dgate, ddown, dup = torch.ops.tokenkit.peer_experts_backward(
        dout.contiguous(), *ctx.saved_tensors, activation=ctx.activation, needs_tables=needs_tables
    )
    if not needs_tables:
        ddown = dup = None
    return dhidden, ddown, dup, None, dgate, None


_experts.register_autograd(_differentiate, setup_context=_save)


def peer_experts(
    hidden_ND: Tensor,
    down_EMD: Tensor,
    up_EMD: Tensor,
    expert_NP: Tensor,
    gate_NP: Tensor,
    activation: str = "gelu",
) -> Tensor:
    """Return [N, D], the sum of each token's experts. Differentiable in hidden states, tables and gates.

    Args:
        hidden_ND: tokens, in the dtype of the tables.
        down_EMD: what each neuron reads with, [E, M, D]; [E, D] is one neuron each.
        up_EMD: what each neuron writes, the same shape and dtype.
        expert_NP: int32 or int64 ids in [0, E) (`product_key_topk`); an id that repeats counts twice.
        gate_NP: factor of each expert, float32 (float64 with float64 tables).
        activation: one of `ACTIVATIONS`; gelu is the exact one.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown activation.
    """
    refuse_forward_mode(hidden_ND, down_EMD, up_EMD, gate_NP)
    if down_EMD.ndim == 2 and up_EMD.ndim == 2:
        down_EMD, up_EMD = down_EMD[:, None], up_EMD[:, None]
    _check(hidden_ND, down_EMD, up_EMD, expert_NP, gate_NP)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    out_ND, _ = _experts(
        hidden_ND.contiguous(), down_EMD.contiguous(), up_EMD.contiguous(), expert_NP.contiguous(),
        gate_NP.contiguous(), activation,
    )  # fmt: skip
    return out_ND


def _check(hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor) -> None:
    if down.ndim != 3 or down.shape != up.shape or hidden.shape != (len(expert), down.shape[2]):
        raise ValueError(
            "expected hidden [N, D] and two tables [E, M, D] or [E, D]: got "
            f"{tuple(hidden.shape)}, {tuple(down.shape)} and {tuple(up.shape)} with {len(expert)} rows of ids"
        )
    if expert.ndim != 2 or expert.shape != gate.shape:
        raise ValueError(
            f"ids and gates must both be [N, P]: got {tuple(expert.shape)} and {tuple(gate.shape)}"
        )
    if not (hidden.dtype == down.dtype == up.dtype) or not hidden.is_floating_point():
        raise ValueError(
            f"hidden states and tables must be of one floating dtype: got {hidden.dtype}, {down.dtype} and "
            f"{up.dtype}"
        )
    if gate.dtype != sum_dtype(down) or expert.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"gates must be {sum_dtype(down)} and ids int32 or int64: got {gate.dtype} and {expert.dtype}"
        )
    if len({tensor.device for tensor in (hidden, down, up, expert, gate)}) > 1:
        raise ValueError(f"hidden states are on {hidden.device}: tables, ids and gates must be there too")
