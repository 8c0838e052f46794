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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.kernels.kinds import ACTIVATIONS
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, refuse_forward_mode, runs_triton
from tokenkit.kernels.table_rows import (
    BLOCK_P,
    Pairs,
    ordered,
    row_dots,
    segment_sums,
    sum_dtype,
    warps_of,
    weighted_rows,
)

MOST_D = 8192
"""The widest rows of the fused kernels: a program holds whole rows."""


@triton.jit
def _act(s, ACTIVATION: tl.constexpr):
    """Return act(s) and act'(s)."""
    if ACTIVATION == "relu":
        f = tl.maximum(s, 0.0)
        slope = tl.where(s > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        z = 1.0 / (1.0 + tl.exp(-s))
        f = s * z
        slope = z + f * (1.0 - z)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        normal = 0.5 * (1.0 + tl.erf(s * 0.7071067811865476))
        f = s * normal
        slope = normal + s * tl.exp(-0.5 * s * s) * 0.3989422804014327
    return f, slope


@triton.jit
def _forward_kernel(
    hidden_ptr, down_ptr, up_ptr, expert_ptr, gate_ptr, out_ptr, s_ptr,
    R, D,
    M: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per token: gather, dot, activate, scale, accumulate; R = P·M neurons in a loop.

    Both rows are asked for before either is used; the sum over neurons is taken once, at the end.
    """
    n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    x = tl.load(hidden_ptr + n * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        pair = n * (R // M) + offs_r // M
        row = tl.load(expert_ptr + pair, mask=mask_r, other=0).to(tl.int64) * M + offs_r % M
        gate = tl.load(gate_ptr + pair, mask=mask_r, other=0.0)
        offs = row[:, None] * D + offs_d[None, :]
        mask = mask_r[:, None] & mask_d[None, :]
        down = tl.load(down_ptr + offs, mask=mask, other=0.0)
        up = tl.load(up_ptr + offs, mask=mask, other=0.0)
        s = tl.sum(down.to(tl.float32) * x[None, :], 1)
        tl.store(s_ptr + n * R + offs_r, s, mask=mask_r)
        f, _ = _act(s, ACTIVATION)
        total += (f * gate)[:, None] * up.to(tl.float32)
    tl.store(out_ptr + n * D + offs_d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _backward_kernel(
    dout_ptr, down_ptr, up_ptr, expert_ptr, gate_ptr, s_ptr,
    dhidden_ptr, dgate_ptr, ds_ptr, factor_ptr,
    R, D,
    M: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per token: dhidden, and of each neuron ds, g·f and its part of the gate's gradient."""
    n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dout = tl.load(dout_ptr + n * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        pair = n * (R // M) + offs_r // M
        row = tl.load(expert_ptr + pair, mask=mask_r, other=0).to(tl.int64) * M + offs_r % M
        gate = tl.load(gate_ptr + pair, mask=mask_r, other=0.0)
        s = tl.load(s_ptr + n * R + offs_r, mask=mask_r, other=0.0)
        offs = row[:, None] * D + offs_d[None, :]
        mask = mask_r[:, None] & mask_d[None, :]
        up = tl.load(up_ptr + offs, mask=mask, other=0.0)
        down = tl.load(down_ptr + offs, mask=mask, other=0.0)
        c = tl.sum(up.to(tl.float32) * dout[None, :], 1)
        f, slope = _act(s, ACTIVATION)
        ds = c * gate * slope
        tl.store(dgate_ptr + n * R + offs_r, c * f, mask=mask_r)
        tl.store(ds_ptr + n * R + offs_r, ds, mask=mask_r)
        tl.store(factor_ptr + n * R + offs_r, f * gate, mask=mask_r)
        total += ds[:, None] * down.to(tl.float32)
    tl.store(dhidden_ptr + n * D + offs_d, tl.sum(total, 0).to(dhidden_ptr.dtype.element_ty), mask=mask_d)


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


def _is_fused(hidden: Tensor, expert: Tensor, D: int) -> bool:
    return runs_triton(hidden) and expert.numel() > 0 and D <= MOST_D


def _sizes(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"BLOCK_R": BLOCK_P, "BLOCK_D": block, "num_warps": warps_of(block)}


def _neurons(expert_NP: Tensor, M: int) -> Tensor:
    """Return the row of each neuron in a table of E·M rows, [N, P·M]."""
    if M == 1:
        return expert_NP
    neuron_M = torch.arange(M, device=expert_NP.device, dtype=expert_NP.dtype)
    return (expert_NP[..., None] * M + neuron_M).flatten(1)


def sums_by_rows(
    hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, activation: str,
    complete: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y [N, D] and s [N, P, M], table after table.

    `complete` makes whole sums of those over a part of the columns, where the tables are a part.
    """
    row_NR, M = _neurons(expert, down.shape[1]), down.shape[1]
    s = row_dots(hidden, down.flatten(0, 1), row_NR).unflatten(1, (-1, M))
    s = s if complete is None else complete(s)
    weight_NR = (_activate(s, activation)[0] * gate[..., None]).flatten(1)
    return weighted_rows(up.flatten(0, 1), row_NR, weight_NR).to(hidden.dtype), s


def gradients_by_rows(
    dout: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, s: Tensor, activation: str,
    *, complete: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden, of the gates for each neuron, of s, and g·f; see `sums_by_rows`."""
    row_NR, M = _neurons(expert, down.shape[1]), down.shape[1]
    c = row_dots(dout, up.flatten(0, 1), row_NR).unflatten(1, (-1, M))
    c = c if complete is None else complete(c)
    f, slope = _activate(s, activation)
    ds = c * slope * gate[..., None]
    dhidden = weighted_rows(down.flatten(0, 1), row_NR, ds.flatten(1))
    return dhidden, c * f, ds, f * gate[..., None]


@torch.library.custom_op("tokenkit::peer_experts", mutates_args=())
def _experts(
    hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y [N, D] and s [N, P, M]."""
    M, D = down.shape[1:]
    if _is_fused(hidden, expert, D):
        out = torch.empty_like(hidden)
        s = gate.new_empty((*expert.shape, M))
        with on_device(hidden):
            _forward_kernel[(len(expert),)](
                hidden, down, up, expert, gate, out, s, expert.shape[1] * M, D,
                M=M, ACTIVATION=activation, **_sizes(D),
            )  # fmt: skip
        return out, s
    return sums_by_rows(hidden, down, up, expert, gate, activation)


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
    E, M, D = down.shape
    if _is_fused(hidden, expert, D):
        dhidden = torch.empty_like(hidden)
        dgate, ds, factor = torch.empty_like(s), torch.empty_like(s), torch.empty_like(s)
        with on_device(hidden):
            _backward_kernel[(len(expert),)](
                dout, down, up, expert, gate, s, dhidden, dgate, ds, factor, expert.shape[1] * M, D,
                M=M, ACTIVATION=activation, **_sizes(D),
            )  # fmt: skip
    else:
        dhidden, dgate, ds, factor = gradients_by_rows(dout, down, up, expert, gate, s, activation)
        dhidden = dhidden.to(hidden.dtype)
    dgate = dgate.sum(-1)
    if not needs_tables:
        return dhidden, dgate, down.new_empty(0), up.new_empty(0)
    pairs = ordered(expert, E)
    ddown, dup = table_gradient(hidden, ds, pairs, down), table_gradient(dout, factor, pairs, up)
    return dhidden, dgate, ddown, dup


def table_gradient(hidden_ND: Tensor, factor_NPM: Tensor, pairs: Pairs, table_EMD: Tensor) -> Tensor:
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
