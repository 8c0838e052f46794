"""Log-probability of each target under a head, of a subset of the vocabulary, and the log-sum-exp.

    y[n, v] = α (hidden[n] · weight[v] + bias[v]),  α = scale / temperature,  z = y or cap · tanh(y / cap)
    lse_C   = log Σ_{v in C} exp z[v]                  C: the subset S, or the rest R;  lse over both
    logp    = z[target] − lse,   subset_logp = lse_S − lse

With upstream a (of logp), b (subset_logp), l (lse) and masses s = exp(lse_S − lse), r = exp(lse_R − lse):

    ∂/∂z[v] = exp(z − lse_S) · ((l − a) s + b r)       v in S
              exp(z − lse_R) · (l − a − b) r           v in R
    and at the target, with p = exp logp:  a (1 − p) + l p + (b r exp(z − lse_S) in S, or − b p in R)

Every factor is at most 1 in size and none is the difference of two nearly equal numbers: 1 − p is
−expm1(logp). Only a tile of z exists at a time, in float32. Three modes give the same gradients:

    mode        FLOP       memory above O(N·D)   when
    frozen      4·N·V·D    a tile                no gradient to the head: the forward adds up exp(z − m) W
    cached      6·N·V·D    N·V and a tile        exp(z − m) fits into `workspace_bytes`
    recompute   8·N·V·D    a tile                otherwise: the backward builds z again

Related: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.

Dimensions: N tokens, V vocabulary (of a tile: its rows), D hidden size, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.kernels.logprob_tile import Mode, Plan, Sums, dlogits, fold, rescale
from tokenkit.kernels.products import Work, add_product, operand, product, write_product
from tokenkit.kernels.vocabulary import REST, SUBSET, Subset, Tile, cut, extend, split_vocabulary
from tokenkit.structs import Head

IGNORE = -100  # the default of torch.nn.functional.cross_entropy
DEFAULT_WORKSPACE_BYTES = 256 * 2**20
FORWARD_TILE_BYTES = 32 * 2**20  # of float32 z, on a GPU
BACKWARD_TILE_BYTES = 128 * 2**20  # 4096 columns at 8192 tokens: the GEMM of dW stays large
CPU_TILE_BYTES = 8 * 2**20  # stays in the last-level cache
COLUMNS = (
    128,
    8192,
)  # fewest: GEMMs smaller than this waste time; most: one program holds a row in registers


class LinearLogprob(NamedTuple):
    """What `linear_logprob` returns: one number a row, nats, float32 (float64 for float64 inputs)."""

    logp_N: Tensor
    """log p(target); 0 in ignored rows."""
    subset_logp_N: Tensor | None
    """log p(any id of the subset); None where no subset was given."""
    is_top1_N: Tensor
    """bool, no id is more likely than the target; False in ignored rows. Not differentiable."""
    lse_N: Tensor
    """log Σ exp z."""


def _forward(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: Plan
) -> tuple[Sums, list[Tensor]]:
    """Return the statistics of every row and what the mode keeps for the backward."""
    N, D = hidden_ND.shape
    sums = Sums(
        hidden_ND.new_full((2, N), -torch.inf, dtype=plan.dtype),
        hidden_ND.new_zeros((2, N), dtype=plan.dtype),
        hidden_ND.new_zeros(N, dtype=plan.dtype),
    )
    kept: list[Tensor] = []
    mean_PND = None
    if plan.mode == "frozen":
        parts = 1 if plan.subset is None else 2
        mean_PND = hidden_ND.new_zeros((parts, N, D), dtype=plan.dtype)
        kept = [mean_PND]
    operand_ND = operand(hidden_ND, plan)
    work = Work(hidden_ND, plan)
    for tile in plan.tiles if N else ():
        weight_tile = operand(weight_VD[tile.rows], plan)
        keeps_z = plan.mode == "cached" and _kept_dtype(hidden_ND, plan) == plan.dtype
        z_NV = product(operand_ND, weight_tile.T, work.tile("z", tile, plan.dtype, fresh=keeps_z))
        p_NV = None
        if plan.mode == "cached":
            p_NV = z_NV if keeps_z else work.tile("p", tile, _kept_dtype(hidden_ND, plan), fresh=True)
        elif plan.mode == "frozen":
            p_NV = z_NV if z_NV.dtype == work.low else work.tile("p", tile, work.low)
        shift_N = fold(z_NV, _bias_tile(bias_V, tile), tile, plan, sums, p_NV)
        if plan.mode == "cached":
            assert p_NV is not None
            kept += [p_NV, shift_N]
        if mean_PND is not None:
            assert p_NV is not None
            rescale(mean_PND[tile.part], shift_N)
            add_product(mean_PND[tile.part], operand(p_NV, plan), weight_tile)
    return sums, kept


def _backward(
    upstream: tuple[Tensor, Tensor | None, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor | None],
    sums: Sums,
    kept: list[Tensor],
    plan: Plan,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias, None where `needs` says so."""
    hidden_ND, weight_VD, bias_V = parameters
    lse_PN, factor_PN, dz_target_N = _row_gradients(upstream, sums, plan)
    if plan.mode == "frozen":
        return _frozen_backward(factor_PN, dz_target_N, parameters, sums, kept[0], plan), None, None

    dhidden_ND = torch.zeros_like(hidden_ND, dtype=plan.dtype) if needs[0] else None
    dweight_VD = torch.empty_like(weight_VD) if needs[1] else None
    dbias_V = torch.zeros_like(bias_V) if needs[2] and bias_V is not None else None
    if dweight_VD is not None:
        dweight_VD[plan.backward_tiles[-1].end :].zero_()  # padding: the tiles hold every other row
    operand_ND = operand(hidden_ND, plan)
    work = Work(hidden_ND, plan)
    for i, tile in enumerate(plan.backward_tiles):
        weight_tile = operand(weight_VD[tile.rows], plan)
        lse_N, factor_N = lse_PN[tile.part], factor_PN[tile.part]
        if plan.mode == "cached":
            z_NV = kept[2 * i] if kept else work.tile("z", tile, plan.dtype)
            if kept:
                factor_N = factor_N * torch.exp(kept[2 * i + 1] - lse_N)
            dz_NV = work.tile("dz", tile, work.low)
        else:
            z_NV = product(operand_ND, weight_tile.T, work.tile("z", tile, plan.dtype))
            dz_NV = z_NV if z_NV.dtype == work.low else work.tile("dz", tile, work.low)
        if len(z_NV):
            dlogits(z_NV, _bias_tile(bias_V, tile), tile, plan, (lse_N, factor_N, dz_target_N), dz_NV)
        dz_NV = operand(dz_NV, plan)
        if dhidden_ND is not None:
            add_product(dhidden_ND, dz_NV, weight_tile)
        if dweight_VD is not None:
            write_product(dweight_VD, tile.rows, dz_NV.T, operand_ND)
        if dbias_V is not None:
            dbias_V[tile.rows] = dz_NV.sum(0, dtype=plan.dtype).to(dbias_V.dtype)
    return None if dhidden_ND is None else dhidden_ND.to(hidden_ND.dtype), dweight_VD, dbias_V


def _row_gradients(
    upstream: tuple[Tensor, Tensor | None, Tensor], sums: Sums, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, α included: lse of each part, the factor of exp(z − lse) in each part, and dz at the target."""
    a_N, b_N, l_N = upstream
    scored_N = plan.position_N >= 0
    a_N = torch.where(scored_N, a_N, 0)
    lse_PN = sums.max_PN + sums.sum_PN.log()
    lse_N = torch.logaddexp(lse_PN[REST], lse_PN[SUBSET])
    mass_PN = torch.exp(lse_PN - lse_N)
    logp_N = torch.where(scored_N, sums.z_target_N - lse_N, 0)
    p_N = torch.exp(logp_N)
    dz_target_N = -a_N * torch.expm1(logp_N) + l_N * p_N
    rest_N = l_N - a_N
    factor_PN = torch.stack([rest_N * mass_PN[REST], rest_N * mass_PN[SUBSET]])
    if b_N is not None and plan.subset is not None:
        factor_PN[REST] -= b_N * mass_PN[REST]
        factor_PN[SUBSET] += b_N * mass_PN[REST]
        inside_N = plan.position_N < plan.subset.size
        share_N = torch.exp(torch.where(scored_N & inside_N, sums.z_target_N - lse_PN[SUBSET], -torch.inf))
        dz_target_N = dz_target_N + b_N * torch.where(inside_N, mass_PN[REST] * share_N, -p_N)
    if plan.cap is not None:
        dz_target_N = dz_target_N * (1 - (sums.z_target_N / plan.cap).square())
    return lse_PN, factor_PN * plan.alpha, torch.where(scored_N, dz_target_N * plan.alpha, 0)


def _frozen_backward(
    factor_PN: Tensor,
    dz_target_N: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor | None],
    sums: Sums,
    mean_PND: Tensor,
    plan: Plan,
) -> Tensor:
    """dX = dz[target] W[target] + Σ_C factor_C / sum_C · Σ_{v in C, not the target} exp(z − m) W[v]."""
    hidden_ND, weight_VD, _ = parameters
    dhidden_ND = dz_target_N[:, None] * weight_VD[plan.target_N].to(plan.dtype)
    share_PN = torch.where(sums.sum_PN > 0, factor_PN / sums.sum_PN, 0)
    for part in range(len(mean_PND)):
        dhidden_ND.addcmul_(share_PN[part, :, None], mean_PND[part])
    return dhidden_ND.to(hidden_ND.dtype)


def _bias_tile(bias_V: Tensor | None, tile: Tile) -> Tensor | None:
    return None if bias_V is None else bias_V[tile.rows]


def _kept_dtype(hidden_ND: Tensor, plan: Plan) -> torch.dtype:
    """The cache's dtype: as exact as the inputs; float16 has no room for small probabilities."""
    return plan.dtype if hidden_ND.dtype.itemsize >= 4 else torch.bfloat16


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: Plan):
        with torch.autocast(hidden_ND.device.type, enabled=False):  # it would round float32 operands
            sums, kept = _forward(hidden_ND, weight_VD, bias_V, plan)
        lse_PN = sums.max_PN + sums.sum_PN.log()
        lse_N = torch.logaddexp(lse_PN[REST], lse_PN[SUBSET])
        scored_N = plan.position_N >= 0
        logp_N = torch.where(scored_N, sums.z_target_N - lse_N, 0)
        is_top1_N = scored_N & (sums.z_target_N >= sums.max_PN.amax(0))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, *sums, *kept)
        ctx.plan = plan
        ctx.mark_non_differentiable(is_top1_N)
        return logp_N, None if plan.subset is None else lse_PN[SUBSET] - lse_N, is_top1_N, lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp_N: Tensor, dsubset_N: Tensor | None, _: None, dlse_N: Tensor):
        hidden_ND, weight_VD, bias_V, max_PN, sum_PN, z_target_N, *kept = ctx.saved_tensors
        with torch.autocast(hidden_ND.device.type, enabled=False):
            gradients = _backward(
                (dlogp_N, dsubset_N, dlse_N),
                (hidden_ND, weight_VD, bias_V),
                Sums(max_PN, sum_PN, z_target_N),
                kept,
                ctx.plan,
                ctx.needs_input_grad,
            )
        return *gradients, None


def linear_logprob(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    *,
    subset_V: Tensor | Subset | None = None,
    temperature: float = 1.0,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> LinearLogprob:
    """Return log p(target) of each row under a head, and the log mass of a subset of the vocabulary.

    Differentiable in `hidden_ND`, the head's weight and its bias, through logp, subset_logp and lse.

    Args:
        hidden_ND: hidden states; bfloat16, float16, float32, or float64.
        head: the head; weight and bias of the dtype and device of `hidden_ND`.
        target_N: int64 ids in [0, vocabulary), or -100: the row's logp is 0 and pulls nothing. Its
            subset_logp and lse are still computed and differentiable.
        subset_V: bool mask of ids; or what `split_vocabulary` made of it, which spares a wait for the device.
        temperature: divides the logits, after the softcap.
        workspace_bytes: bound on what is allocated beside results and O(N·D); a tile has at least 128
            columns whatever the bound, and exp(z − m) is kept between forward and backward if it fits.

    Raises:
        ValueError: if shapes, dtypes or (on a CPU) ids do not fit together.

    Precision: logits, sums and hidden gradients are float32 (float64 for float64); the gradients of 16-bit
    weights are rounded once. Bitwise repeatable: no atomics.
    """
    _check(hidden_ND, head, target_N, temperature)
    plan = _plan(hidden_ND, head, target_N, subset_V, temperature, workspace_bytes)
    return LinearLogprob(*_LinearLogprob.apply(hidden_ND, head.weight_VD, head.bias_V, plan))


def _plan(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    subset_V: Tensor | Subset | None,
    temperature: float,
    workspace_bytes: int,
) -> Plan:
    V = _vocab_size(head)
    subset = split_vocabulary(subset_V) if isinstance(subset_V, Tensor) else subset_V
    if subset is not None:
        subset = extend(subset, V)
    scored_N = target_N != IGNORE
    target_N = torch.where(scored_N, target_N, 0)
    position_N = target_N if subset is None else subset.position_V[target_N]
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    trains_head = head.weight_VD.requires_grad or (head.bias_V is not None and head.bias_V.requires_grad)

    forward_bytes, backward_bytes = FORWARD_TILE_BYTES, BACKWARD_TILE_BYTES
    if not hidden_ND.is_cuda:
        forward_bytes = backward_bytes = CPU_TILE_BYTES
    N, itemsize = len(hidden_ND), max(hidden_ND.dtype.itemsize, 2)
    kept_bytes = N * V * (itemsize if itemsize > 2 else 2)
    mode: Mode = "recompute"
    if not torch.is_grad_enabled() or not (trains_head or hidden_ND.requires_grad):
        mode = "statistics"
    elif not trains_head:
        mode = "frozen"
    elif kept_bytes + backward_bytes <= workspace_bytes and head.softcap is None:
        mode = "cached"  # with a softcap the slope needs z, which 16 bits of exp(z − m) do not hold
    if mode in ("frozen", "cached"):
        forward_bytes = backward_bytes
    columns, backward_columns = (
        _columns(N, min(size, workspace_bytes), hidden_ND) for size in (forward_bytes, backward_bytes)
    )
    return Plan(
        mode=mode,
        tiles=cut(V, columns, subset),
        backward_tiles=cut(V, backward_columns, subset),
        target_N=target_N,
        position_N=torch.where(scored_N, position_N, -1),
        subset=subset,
        alpha=head.scale / temperature,
        cap=None if head.softcap is None else head.softcap / temperature,
        dtype=dtype,
    )


def _columns(N: int, tile_bytes: int, hidden_ND: Tensor) -> int:
    fewest, most = COLUMNS
    columns = tile_bytes // (max(N, 1) * (8 if hidden_ND.dtype == torch.float64 else 4))
    return min(max(columns // fewest * fewest, fewest), most)


def _vocab_size(head: Head) -> int:
    return head.weight_VD.shape[0] if head.vocab_size is None else head.vocab_size


def _check(hidden_ND: Tensor, head: Head, target_N: Tensor, temperature: float) -> None:
    weight_VD, V = head.weight_VD, _vocab_size(head)
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "hidden_ND and the head's weight_VD must share their last dimension D: "
            f"got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if target_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"target_N must hold one id per row of hidden_ND ({hidden_ND.shape[0]}): "
            f"got shape {tuple(target_N.shape)}"
        )
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden_ND is {hidden_ND.dtype} but the head's weight_VD is {weight_VD.dtype}: "
            "cast the head once, when the model is loaded"
        )
    if any(hasattr(x, "device_mesh") for x in (hidden_ND, weight_VD)):
        raise ValueError(
            "linear_logprob takes plain tensors, and got a DTensor: call it inside the forward of the "
            "sharded module that owns the head"
        )
    if not 0 < V <= weight_VD.shape[0]:
        raise ValueError(f"vocab_size must be in [1, {weight_VD.shape[0]}], the rows of weight_VD: got {V}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive: got {temperature}")
    if target_N.numel() and not target_N.is_cuda:
        low, high = (int(x) for x in torch.aminmax(torch.where(target_N == IGNORE, 0, target_N)))
        if low < 0 or high >= V:
            raise ValueError(
                f"target_N must hold ids in [0, {V}) or {IGNORE}: got {low} to {high}; "
                "are they ids of the other model's tokenizer?"
            )
