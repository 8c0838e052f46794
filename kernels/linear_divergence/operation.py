"""Divergence of two models' next-token distributions, from hidden states and heads, never from stored logits.

    z = softcap(scale (hidden · weight + bias)) / T     T: temperature; the teacher's by teacher_temperature
    p = softmax of the student's z,   q = softmax of the teacher's, over the same outcomes (`outcomes.py`)
    value = D(p, q),   ∂value/∂z_s = e − p Σ e          kinds, D and e: `terms.py`

The teacher's gradient is the same with the two in each other's place (kl ↔ rkl, skl ↔ srkl). Modes, in GEMMs
of 2·N·V·D (both models counted alike), and memory above `workspace_bytes` and O(N·D):

    mode        when                                                GEMMs   memory
    value       no gradient is wanted                               2       none
    rows        the student's head is frozen: ∂value/∂hidden of     3       none
                each row is formed in the forward
    weighted    `row_weight_N` is given: all gradients are formed   4       float32 dW: that of a 16-bit head
                in the forward                                              must fit `workspace_bytes`
    recompute   otherwise: the forward keeps 11 numbers a row       6       none

Sources: skewed, Ko et al., arXiv:2402.03898; adaptive, Wu et al., arXiv:2404.02657.

Dimensions: N rows, V student and W teacher vocabulary, D and E hidden sizes, P pairs.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from tokenkit.kernels.head.call import Packed, unpack, wanted
from tokenkit.kernels.linear_divergence.checks import check_numbers, check_sides, check_values
from tokenkit.kernels.linear_divergence.passes import by_chunks, by_tiles
from tokenkit.kernels.linear_divergence.rows import RowState
from tokenkit.kernels.linear_divergence.settings import DEFAULTS, Options, mode_of, prepare, problem_of
from tokenkit.structs import Head


@torch.library.custom_op(
    "tokenkit::linear_divergence",
    mutates_args=(),
    schema="(Tensor student, Tensor weight, Tensor? bias, Tensor teacher, Tensor[] constants, "
    "float[] numbers, str words) -> Tensor[]",
)
def _divergence(
    student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, *packed: Any
) -> list[Tensor]:
    with torch.autocast(student.device.type, enabled=False):  # it would round float32 operands
        problem, call = problem_of((student, weight, bias, teacher), packed)
        upstream_N = None
        if call["mode"] == "rows":
            upstream_N = student.new_ones(len(student), dtype=problem.dtype)
        elif call["mode"] == "weighted":
            upstream_N = call["row_weight"].to(problem.dtype)
        value_N, state, gradients = by_chunks(problem, upstream_N, call["needs"], call["workspace_bytes"])
    problem.student.check_finite(state.top_N + state.lse_N)
    problem.teacher.check_finite(state.teacher_top_N + state.teacher_lse_N)
    check_values(value_N, problem.kind)
    if call["mode"] == "recompute":
        return [value_N, torch.stack(state)]
    if call["mode"] == "value":
        return [value_N]
    if call["mode"] == "weighted" and upstream_N is not None:
        value_N = (value_N * upstream_N).sum()
    return [value_N, *_in_order(gradients, student, weight, bias)]


def _in_order(
    gradients: list[Tensor | None], student: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """Return one tensor for each gradient, empty where it is not wanted; the head's in its dtype."""
    dtypes = None, weight.dtype, None if bias is None else bias.dtype, None
    found = zip(gradients, dtypes, strict=True)
    return [student.new_empty(0) if x is None else x.to(dtype or x.dtype) for x, dtype in found]


@_divergence.register_fake
def _(student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, *packed: Any) -> Any:
    call = unpack(*packed)
    mode, needs = call["mode"], call["needs"]
    dtype = torch.promote_types(student.dtype, torch.float32)
    value = student.new_empty(() if mode == "weighted" else student.shape[0], dtype=dtype)
    if mode == "recompute":
        return [value, student.new_empty((len(RowState._fields), student.shape[0]), dtype=dtype)]
    if mode == "value":
        return [value]
    return [
        value,
        student.new_empty(student.shape if "x" in needs else 0, dtype=dtype if "x" in needs else None),
        torch.empty_like(weight) if "w" in needs else student.new_empty(0),
        torch.empty_like(bias) if "b" in needs and bias is not None else student.new_empty(0),
        student.new_empty(teacher.shape if "t" in needs else 0, dtype=dtype if "t" in needs else None),
    ]


@torch.library.custom_op(
    "tokenkit::linear_divergence_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor state, Tensor student, Tensor weight, Tensor? bias, Tensor teacher, "
    "Tensor[] constants, float[] numbers, str words) -> Tensor[]",
)
def _divergence_backward(upstream: Tensor, state: Tensor, *inputs: Any) -> list[Tensor]:
    student, weight, bias, teacher, *packed = inputs
    with torch.autocast(student.device.type, enabled=False):
        problem, call = problem_of((student, weight, bias, teacher), _packed(packed))
        gradients = by_tiles(
            problem, RowState(*state.unbind()), upstream, call["needs"], call["workspace_bytes"]
        )
    student_ND, weight_VD, bias_V, teacher_NE = _in_order(gradients, student, weight, bias)
    return [student_ND.to(student.dtype), weight_VD, bias_V, teacher_NE.to(teacher.dtype)]


def _packed(packed: list[Any]) -> Packed:
    return packed[0], packed[1], packed[2]


@_divergence_backward.register_fake
def _(upstream: Tensor, state: Tensor, *inputs: Any) -> list[Tensor]:
    student, weight, bias, teacher, *packed = inputs
    needs = unpack(*packed)["needs"]
    return [
        torch.empty_like(x)
        if letter in needs and x is not None
        else student.new_empty(0, dtype=x.dtype if letter == "t" else None)
        for letter, x in zip("xwbt", (student, weight, bias, teacher), strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # zeros of the size of dW, for outputs that nobody differentiates
    student, weight, bias, teacher, constants, *packed = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (student, weight, bias, teacher)]
    ctx.lists, ctx.packed = len(constants), packed
    call = unpack(constants, *packed)
    ctx.mode, ctx.needs = call["mode"], call["needs"]
    if ctx.mode == "recompute":
        ctx.save_for_backward(output[1], student, weight, bias, teacher, *constants)
    else:
        ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
    upstream, none = upstreams[0], [None] * ctx.lists
    if upstream is None:
        return None, None, None, None, none, None, None
    if torch.is_grad_enabled():
        raise RuntimeError("linear_divergence has no second derivative: call backward without create_graph")
    if ctx.mode == "recompute":
        state, student, weight, bias, teacher, *constants = ctx.saved_tensors
        found = _divergence_backward(
            upstream.contiguous(), state, student, weight, bias, teacher, constants, *ctx.packed
        )
    else:
        factor = upstream[:, None] if ctx.mode == "rows" else upstream
        factors = zip("xwbt", ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [(x * factor).to(dtype) if letter in ctx.needs else x for letter, x, dtype in factors]
    owed = (x if letter in ctx.needs else None for letter, x in zip("xwbt", found, strict=True))
    return *owed, none, None, None


_divergence.register_autograd(_gradients, setup_context=_keep)


def linear_divergence(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    kind: str = "kl",
    **options: Unpack[Options],
) -> Tensor:
    """Return the divergence of each row, float32 (float64 for float64), nats, or their weighted sum.

    Differentiable in `student_ND`, the student head's weight and bias, and `teacher_NE`.

    Args:
        student_ND: hidden states; bfloat16, float16, float32, or float64.
        student_head: weight and bias of that dtype and device.
        teacher_NE: hidden states of the same rows.
        teacher_head: frozen; of the dtype of `teacher_NE`.
        kind: one of `KINDS`.
        **options:
            teacher_index: int64 [V], the teacher id that each student id faces; or [P], see `student_index`.
            student_index: int64 [P]: student id student_index[k] faces teacher id teacher_index[k], and the
                probabilities are over the pairs; `abs` and `log_abs` take those under the full vocabularies.
            outcomes: what `match_outcomes` returned, instead of both; it spares a wait for the device.
            rest_as_outcome: with pairs, take probabilities under the full vocabularies, and the ids in no
                pair as one outcome more.
            temperature: divides both models' logits, after the softcap.
            teacher_temperature: divides the teacher's further.
            skew: λ in [0, 1] of skl and srkl.
            alpha: mass in [0, 1) of akl's tail; of equally likely outcomes, the later are nearer the tail.
            row_weight_N: constant weights; the result is then Σ weight · divergence, a scalar.
            workspace_bytes: bound on what is allocated beside results, O(N·D) and a float32 dW.

    Raises:
        ValueError: shapes, dtypes, devices, ids or numbers out of range, a head that cannot be divided so,
            a teacher head that requires a gradient, or (on a CPU) hidden states that are not finite.

    Precision: logits, sums and hidden gradients are float32 (float64); dW of 16-bit heads is rounded once, in
    mode weighted again when the upstream gradient multiplies it. Bitwise repeatable: no atomics.
    """
    settled: dict[str, Any] = {**DEFAULTS, **options}
    if len(settled) > len(DEFAULTS):
        raise TypeError(f"linear_divergence has no argument {sorted(set(options) - set(DEFAULTS))[0]!r}")
    check_numbers(kind, settled)
    check_sides(student_ND, student_head, teacher_NE, teacher_head, settled)
    row_weight_N = settled["row_weight_N"]
    if kind in ("skl", "srkl") and settled["skew"] in (0, 1):
        if settled["skew"] == 1:  # the mixture is the distribution itself; js is finite whatever the ids
            return 0 * linear_divergence(student_ND, student_head, teacher_NE, teacher_head, "js", **options)
        kind = kind[1:] if kind == "skl" else "rkl"
    inputs = (student_ND, student_head.weight_VD, student_head.bias_V, teacher_NE)
    needs = wanted(*inputs)
    packed = prepare(
        kind,
        (student_head, teacher_head),
        settled,
        mode_of(inputs, len(teacher_head.weight_VD), needs, settled),
        needs,
    )
    value = _divergence(*inputs, *packed)[0]
    if row_weight_N is None or value.ndim == 0:
        return value
    return (row_weight_N.detach() * value).sum()
