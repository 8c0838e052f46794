"""Log-probability of each target under a head, of a subset of the vocabulary, and the log-sum-exp.

    y[n, v] = α (hidden[n] · weight[v] + bias[v]),  α = scale / temperature,  z = y or cap · tanh(y / cap)
    lse_C   = log Σ_{v in C} exp z[v]                  C: the subset S, or the rest R;  lse over both
    logp    = z[target] − lse,   subset_logp = lse_S − lse

With upstream a (of logp), b (subset_logp), l (lse) and masses s = exp(lse_S − lse), r = exp(lse_R − lse):

    ∂/∂z[v] = exp(z − lse_S) · ((l − a) s + b r)       v in S
              exp(z − lse_R) · (l − a − b) r           v in R
    and at the target, with p = exp logp:  a (1 − p) + l p + (b r exp(z − lse_S) in S, or − b p in R)

Every factor is at most 1 in size and none is the difference of two nearly equal numbers: 1 − p is the sum
over the others, which is kept without the target, and logp of a sure one −log1p of it. Logits are float32
and never stored whole. Three modes give the same gradients:

    mode        FLOP       memory above O(N·D)   when
    frozen      4·N·V·D    a tile                no gradient to the head: the forward adds up exp(z − m) W
    cached      6·N·V·D    N·V and a tile        exp(z − m) fits into `workspace_bytes`
    recompute   8·N·V·D    a tile                otherwise: the backward builds z again

Two executors run them: a loop over tiles of z (`tiled.py`), and where there is no room for a
tile and Triton runs, kernels that keep z in registers (`fused.py`). Where the vocabulary is
divided over processes, the forward adds 5 numbers per token over them, the backward dX.

Related: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.

Dimensions: N tokens, V vocabulary (here: the rows of this process), D hidden size, P parts of it (R, S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head.call import head_fields, pack, unpack, wanted
from tokenkit.kernels.head.products import Gradients
from tokenkit.kernels.head.sharded import check_cover, local_rows, reduce_max, reduce_sum, vocab_size
from tokenkit.kernels.head.side import check_side
from tokenkit.kernels.launch import refuse_forward_mode
from tokenkit.kernels.linear_logprob import fused, tiled
from tokenkit.kernels.linear_logprob.plan import (
    REST,
    SUBSET,
    Mode,
    Plan,
    Subset,
    Sums,
    check_targets,
    fits_cache,
    kept_dtype,
    make_plan,
    masses,
    split_vocabulary,
)
from tokenkit.structs import Head

DEFAULT_WORKSPACE_BYTES = 256 * 2**20
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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


@torch.library.custom_op("tokenkit::linear_logprob", mutates_args=())
def _operation(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    subset: Sequence[Tensor],
    numbers: Sequence[float],
    words: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logp, subset_logp (or nothing), is_top1, lse; for the backward sums, kept, shift."""
    plan = _plan((hidden_ND, weight_VD, bias_V), target_N, subset, (numbers, words))
    check_targets(target_N, vocab_size(plan.side.head))
    with torch.autocast(hidden_ND.device.type, enabled=False):  # it would round float32 operands
        sums, sums_5N, kept, shift = _forward(plan)
    found = masses(sums, plan.scored_N, plan.in_subset_N)
    plan.side.check_finite(found.lse_N)
    is_top1_N = plan.scored_N & (sums.z_target_N >= sums.max_PN.amax(0))
    subset_logp_N = found.log_mass_PN[SUBSET].clone() if subset else found.lse_N.new_empty(0)
    return found.logp_N, subset_logp_N, is_top1_N, found.lse_N, sums_5N, kept, shift


@_operation.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    subset: Sequence[Tensor],
    numbers: Sequence[float],
    words: str,
) -> tuple[Tensor, ...]:
    call = unpack([], numbers, words)
    mode, (N, D) = call["mode"], hidden_ND.shape
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    logp_N = hidden_ND.new_empty(N, dtype=dtype)
    kept, shift = (hidden_ND.new_empty(0, dtype=dtype) for _ in range(2))
    if mode == "frozen":
        kept = hidden_ND.new_empty((2 if subset else 1, N, D), dtype=dtype)
    elif mode == "cached":
        plan = make_plan((hidden_ND, weight_VD, bias_V), target_N, subset, call)
        kept = hidden_ND.new_empty(N * plan.rows, dtype=kept_dtype(hidden_ND))
        shift = hidden_ND.new_empty((len(plan.tiles), 2, N), dtype=dtype)
    subset_logp_N = torch.empty_like(logp_N) if subset else hidden_ND.new_empty(0, dtype=dtype)
    is_top1_N = torch.empty_like(logp_N, dtype=torch.bool)
    return logp_N, subset_logp_N, is_top1_N, torch.empty_like(logp_N), logp_N.new_empty((5, N)), kept, shift


@torch.library.custom_op("tokenkit::linear_logprob_backward", mutates_args=())
def _backward_operation(
    upstream: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    subset: Sequence[Tensor],
    numbers: Sequence[float],
    words: str,
    needs: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, empty where `needs` says so."""
    hidden_ND, weight_VD, bias_V = parameters
    assert hidden_ND is not None
    assert weight_VD is not None
    target_N, sums_5N, kept, shift = saved
    plan = _plan((hidden_ND, weight_VD, bias_V), target_N, subset, (numbers, words))
    sums = Sums(sums_5N[:2], sums_5N[2:4], sums_5N[4])
    with torch.autocast(hidden_ND.device.type, enabled=False):
        found = _backward(upstream, (sums, kept, shift), plan, needs)
    first, second, third = (hidden_ND.new_empty(0) if x is None else x for x in found)
    return first, second, third


@_backward_operation.register_fake
def _(
    upstream: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    subset: Sequence[Tensor],
    numbers: Sequence[float],
    words: str,
    needs: str,
) -> tuple[Tensor, ...]:
    hidden_ND = parameters[0]
    assert hidden_ND is not None
    return tuple(
        torch.empty_like(x) if x is not None and letter in needs else hidden_ND.new_empty(0)
        for x, letter in zip(parameters, "xwb", strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_ND, weight_VD, bias_V, target_N, subset, ctx.numbers, ctx.words = inputs
    ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, *output[4:], *subset)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2], *output[4:])


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_logprob has no second derivative: call backward without create_graph")
    hidden_ND, weight_VD, bias_V, target_N, sums_5N, kept, shift, *subset = ctx.saved_tensors
    needs = "".join(x for x, needed in zip("xwb", ctx.needs_input_grad[:3], strict=True) if needed)
    found = _backward_operation(
        [upstream[0], upstream[1] if subset else None, upstream[3]],
        [hidden_ND, weight_VD, bias_V], [target_N, sums_5N, kept, shift],
        subset, ctx.numbers, ctx.words, needs,
    )  # fmt: skip
    dhidden_ND, dweight_VD, dbias_V = (
        x if letter in needs else None for x, letter in zip(found, "xwb", strict=True)
    )
    return dhidden_ND, dweight_VD, dbias_V, None, [None] * len(subset), None, None


_operation.register_autograd(_differentiate, setup_context=_save)


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    target_N: Tensor,
    subset: Sequence[Tensor],
    packed: tuple[Sequence[float], str],
) -> Plan:
    return make_plan(tensors, target_N, subset, unpack([], *packed))


def _forward(plan: Plan) -> tuple[Sums, Tensor, Tensor, Tensor]:
    """Return the statistics of every row, the tensor that holds them, and what the mode keeps."""
    hidden_ND, head = plan.side.hidden_ND, plan.side.head
    N, D = hidden_ND.shape
    sums_5N = hidden_ND.new_zeros((5, N), dtype=plan.dtype)
    sums = Sums(sums_5N[:2].fill_(-torch.inf), sums_5N[2:4], sums_5N[4])
    kept, shift = (hidden_ND.new_empty(0, dtype=plan.dtype) for _ in range(2))
    if plan.mode == "frozen":
        kept = hidden_ND.new_zeros((1 if plan.subset is None else 2, N, D), dtype=plan.dtype)
    elif plan.mode == "cached":
        kept = hidden_ND.new_empty(N * plan.rows, dtype=kept_dtype(hidden_ND))
        shift = hidden_ND.new_empty(len(plan.tiles), 2, N, dtype=plan.dtype)
    if N and plan.rows and fused.takes(plan):
        fused.forward(plan, sums, kept)
    elif N and plan.rows:
        tiled.forward(plan, sums, kept, shift)
    if head.shard is not None:
        check_cover(head, hidden_ND.device)
        before_PN = sums.max_PN.clone()
        reduce_max(sums.max_PN, head)
        shrink_PN = torch.where(before_PN == -torch.inf, 0, torch.exp(before_PN - sums.max_PN))
        sums.sum_PN.mul_(shrink_PN)
        reduce_sum(sums_5N[2:], head)
        if plan.mode == "frozen":
            for part in range(len(kept)):
                tiled.rescale(kept[part], shrink_PN[part])
    return sums, sums_5N, kept, shift


def _backward(
    upstream: Sequence[Tensor | None], saved: tuple[Sums, Tensor, Tensor], plan: Plan, needs: str
) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias, None where `needs` says so."""
    side = plan.side
    sums, kept, shift = saved
    rows = _row_gradients(upstream, sums, plan)
    if plan.mode == "frozen":
        gradient_ND = _frozen_gradient(rows, side.head.weight_VD, kept, plan)
        return [reduce_sum(gradient_ND, side.head).to(side.hidden_ND.dtype), None, None]
    gradients = Gradients(side, needs, adds=False)
    if len(side.hidden_ND) and plan.rows and fused.takes(plan, backward=True):
        fused.backward(rows, plan, gradients)
    elif plan.rows:
        tiled.backward(rows, (kept, shift), plan, gradients)
    tensors = side.hidden_ND, side.head.weight_VD, side.head.bias_V
    found = zip(gradients.results(), tensors, strict=True)
    return [None if x is None or like is None else x.to(like.dtype) for x, like in found]


def _row_gradients(
    upstream: Sequence[Tensor | None], sums: Sums, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, α included: the maximum of each part, the factor of exp(z − maximum) in it, dz at the target.

    The maximum and not lse, because z − maximum is exact where it counts, and lse is a rounded number.
    """
    b_N, scored_N = upstream[1], plan.scored_N
    a_N, l_N = (torch.zeros_like(sums.z_target_N) if x is None else x for x in (upstream[0], upstream[2]))
    a_N = torch.where(scored_N, a_N, 0)
    found = masses(sums, scored_N, plan.in_subset_N)
    mass_PN, p_N = found.mass_PN, found.p_N
    dz_target_N = a_N * found.others_N + l_N * p_N
    rest_N = l_N - a_N
    factor_PN = torch.stack([rest_N * mass_PN[REST], rest_N * mass_PN[SUBSET]])
    if b_N is not None and plan.in_subset_N is not None:
        inside_N = plan.in_subset_N
        factor_PN[REST] -= b_N * mass_PN[REST]
        factor_PN[SUBSET] += b_N * mass_PN[REST]
        at_target_N = torch.where(inside_N, sums.z_target_N - sums.max_PN[SUBSET], -torch.inf)
        share_N = torch.exp(at_target_N) / torch.where(inside_N, found.sum_PN[SUBSET], 1)
        dz_target_N = dz_target_N + b_N * torch.where(inside_N, mass_PN[REST] * share_N, -p_N)
    if plan.side.cap is not None:
        dz_target_N = dz_target_N * (1 - (sums.z_target_N / plan.side.cap).square())
    factor_PN = torch.where(found.sum_PN > 0, factor_PN * plan.side.alpha / found.sum_PN, 0)
    return sums.max_PN, factor_PN, torch.where(scored_N, dz_target_N * plan.side.alpha, 0)


def _frozen_gradient(
    rows: tuple[Tensor, Tensor, Tensor], weight_VD: Tensor, mean_PND: Tensor, plan: Plan
) -> Tensor:
    """dX = dz[target] W[target] + Σ_C factor_C · Σ_{v in C, not the target} exp(z − m) W[v]."""
    _, factor_PN, dz_target_N = rows
    if not plan.rows:
        return torch.zeros_like(mean_PND[0])
    target_ND = weight_VD[plan.row_N.clamp_min(0)].to(plan.dtype)
    dhidden_ND = torch.where(plan.row_N >= 0, dz_target_N, 0)[:, None] * target_ND
    for part in range(len(mean_PND)):
        dhidden_ND.addcmul_(factor_PN[part, :, None], mean_PND[part])
    return dhidden_ND


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
    _check(hidden_ND, head, target_N, temperature, workspace_bytes)
    refuse_forward_mode(hidden_ND, head.weight_VD, head.bias_V)
    subset = split_vocabulary(subset_V) if isinstance(subset_V, Tensor) else subset_V
    _, numbers, words = pack(
        mode=_mode(hidden_ND, head, workspace_bytes),
        temperature=float(temperature),
        workspace_bytes=workspace_bytes,
        head=head_fields(head, tensors=False),
    )
    logp_N, subset_logp_N, is_top1_N, lse_N, *_ = _operation(
        hidden_ND, head.weight_VD, head.bias_V, target_N, list(subset or ()), numbers, words
    )
    return LinearLogprob(logp_N, None if subset is None else subset_logp_N, is_top1_N, lse_N)


def _mode(hidden_ND: Tensor, head: Head, workspace_bytes: int) -> Mode:
    needs = wanted(hidden_ND, head.weight_VD, head.bias_V)
    if needs in ("", "x"):
        return "frozen" if needs else "statistics"
    if torch.compiler.is_compiling() or head.softcap is not None:
        return (
            "recompute"  # compiled, N may be unknown; a softcap's slope needs z, of which exp(z − m) is short
        )
    start, end = local_rows(head)
    return "cached" if fits_cache(hidden_ND, end - start, workspace_bytes) else "recompute"


def _check(hidden_ND: Tensor, head: Head, target_N: Tensor, temperature: float, workspace_bytes: int) -> None:
    check_side("hidden_ND", hidden_ND, head)
    if target_N.ndim != 1 or target_N.dtype != torch.int64 or len(target_N) != len(hidden_ND):
        raise ValueError(
            f"target_N must hold one int64 id per row of hidden_ND ({hidden_ND.shape[0]}): "
            f"got {target_N.dtype} of shape {tuple(target_N.shape)}"
        )
    if hidden_ND.dtype not in DTYPES:
        raise ValueError(f"hidden_ND must be of one of {DTYPES}: got {hidden_ND.dtype}")
    if target_N.device != hidden_ND.device:
        raise ValueError(
            f"hidden_ND is on {hidden_ND.device} but target_N is on {target_N.device}: move one of them"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite: got {temperature}")
    if workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be at least 0: got {workspace_bytes}")
