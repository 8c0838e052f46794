"""Distance between the sorted next-token distributions of two models, without a sort (ULD).

    p = softmax of the student's logits, q = softmax of the teacher's, both at `temperature`
    value = Σ_r |p_(r) − q_(r)|          (r): r-th largest; the smaller vocabulary goes on with zeros
          = ∫ |#{v: p_v > τ} − #{v: q_v > τ}| dτ

The integral needs no order inside a bin of τ between two edges: with D the difference of the counts above
the bin, w its width, and f how far into the bin its p's reach, summed, less the same of its q's,

    ∫ over a bin of (#{p > τ} − #{q > τ}) dτ = w (D + f),       value ≈ Σ_bins w |D + f|
    ∂value / ∂p_v = sign of (D + f) in the bin of p_v = G_v,    ∂value / ∂z_v = p_v (G_v − Σ_u p_u G_u)

Only a bin in which the two counts cross is not exact: the value is a lower bound, `error_bound` says by how
much at most, and the gradient is that of the value. Bins: `tile.py`. `exact` sorts instead:
`exact.py`.

Both models' logits exist for a few rows at a time, in float32. Modes, in GEMMs of 2·N·V·D (both models
counted alike) and memory above `workspace_bytes` and O(N·D):

    mode        when                                    GEMMs            memory
    values      no gradient is wanted                   2                none
    formed      the head is frozen (a row's dX is       3                none
                scaled later); or row weights are       4                none: a second dW in float32 fits
                known, and a second dW fits                              `workspace_bytes` (its half: 16 bits)
    tables      otherwise                               5                3 KB a row: the sign of every bin
    replay      exact, neither weights nor frozen       6                a second, float32 dW

Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
LLMs", arXiv:2402.12030.

Dimensions: N rows, V student and W teacher vocabulary, D and E hidden sizes, B bins.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from tokenkit.kernels.head.call import head_fields, head_of, pack, unpack, wanted
from tokenkit.kernels.head.side import Side, check_row_weight, check_side, side_of
from tokenkit.kernels.launch import refuse_forward_mode
from tokenkit.kernels.sorted_distance import tile
from tokenkit.kernels.sorted_distance.exact import sorts
from tokenkit.kernels.sorted_distance.rows import Options, run, run_backward, run_bounds
from tokenkit.structs import Head

DEFAULT_WORKSPACE_BYTES = 2**30  # on a GPU a chunk of 128k + 152k logits should hold 700 rows


class Keywords(TypedDict, total=False):
    """Keyword arguments of `sorted_distance`; it says what they mean."""

    temperature: float
    exact: bool | None
    row_weight_N: Tensor | None
    workspace_bytes: int


def _student(
    student_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: dict[str, Any]
) -> tuple[Side, Options]:
    head = head_of(call["student_head"], weight_VD, bias_V)
    options = Options(*(call[name] for name in Options._fields))
    return side_of("student_ND", student_ND, head, call["temperature"]), options


@torch.library.custom_op("tokenkit::sorted_distance", mutates_args=())
def _operation(
    student_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    constants: list[Tensor],
    numbers: list[float],
    words: str,
) -> list[Tensor]:
    """Return the value, then what the mode keeps."""
    call = unpack(constants, numbers, words)
    student, options = _student(student_ND, weight_VD, bias_V, call)
    teacher = side_of("teacher_NE", call["teacher_NE"], head_of(call["teacher_head"]), call["temperature"])
    with torch.autocast(student_ND.device.type, enabled=False):  # it would round float32 operands
        return run(student, teacher, call.get("row_weight_N"), options)


@_operation.register_fake
def _(
    student_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    constants: list[Tensor],
    numbers: list[float],
    words: str,
) -> list[Tensor]:
    call = unpack(constants, numbers, words)
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    row_N = student_ND.new_empty(student_ND.shape[:1], dtype=dtype)
    value = row_N.new_empty(()) if "row_weight_N" in call else torch.empty_like(row_N)
    if call["mode"] == "formed":
        return [value, *_like(student_ND, weight_VD, bias_V, call["needs"], dtype)]
    if call["mode"] == "tables":
        sign_NB = row_N.new_empty((row_N.shape[0], tile.BINS), dtype=torch.int8)
        foot_N = torch.empty_like(row_N, dtype=torch.float32)
        return [value, row_N, torch.empty_like(row_N), foot_N, torch.empty_like(row_N), sign_NB]
    return [value]


@torch.library.custom_op(
    "tokenkit::sorted_distance_backward",
    mutates_args=(),
    schema="(Tensor student, Tensor weight, Tensor? bias, Tensor factor, Tensor[] tables, "
    "Tensor[] constants, float[] numbers, str words) -> Tensor[]",
)
def _backward_operation(
    student: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, tables: list[Tensor], *packed: Any
) -> list[Tensor]:
    """Return the gradients that mode `tables` owes, in the order of `needs`."""
    side, options = _student(student, weight, bias, unpack(*packed))
    with torch.autocast(student.device.type, enabled=False):
        return run_backward(side, factor, tables, options)


@_backward_operation.register_fake
def _(
    student: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, tables: list[Tensor], *packed: Any
) -> list[Tensor]:
    return _like(student, weight, bias, unpack(*packed)["needs"], None)


def _like(
    student_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: str, dtype: torch.dtype | None
) -> list[Tensor]:
    """Return uninitialised tensors for the gradients that are needed."""
    parameters = zip("xwb", (student_ND, weight_VD, bias_V), strict=True)
    return [torch.empty_like(x, dtype=dtype) for name, x in parameters if name in needs and x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    student_ND, weight_VD, bias_V, constants, *ctx.packed = inputs
    call = unpack(constants, *ctx.packed)
    ctx.mode, ctx.needs, ctx.constants = call["mode"], call["needs"], len(constants)
    ctx.is_weighted = "row_weight_N" in call
    ctx.dtypes = {"x": student_ND.dtype, "w": weight_VD.dtype, "b": None if bias_V is None else bias_V.dtype}
    ctx.set_materialize_grads(False)
    if ctx.mode == "formed":
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(student_ND, weight_VD, bias_V, *output[1:], *constants)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    dvalue = upstream[0]
    if dvalue is None:
        return _in_order({}, ctx)
    if torch.is_grad_enabled():
        raise RuntimeError("sorted_distance has no second derivative: call backward without create_graph")
    if ctx.mode == "formed":
        factor = dvalue if ctx.is_weighted else dvalue[:, None]
        formed = [sums * factor for sums in ctx.saved_tensors]
    else:
        student_ND, weight_VD, bias_V, *kept = ctx.saved_tensors
        constants = kept[len(kept) - ctx.constants :]
        call = unpack(constants, *ctx.packed)
        if ctx.mode == "tables":
            factor_N = dvalue * call["row_weight_N"] if ctx.is_weighted else dvalue
            tables = kept[: len(kept) - ctx.constants]
            inputs = student_ND, weight_VD, bias_V, factor_N, tables
            formed = _backward_operation(*inputs, constants, *ctx.packed)
        else:
            packed = pack(**(call | {"row_weight_N": dvalue, "mode": "formed"}))
            _, *formed = _operation(student_ND, weight_VD, bias_V, *packed)
    owed = zip(ctx.needs, formed, strict=True)
    return _in_order({name: sums.to(ctx.dtypes[name]) for name, sums in owed}, ctx)


def _in_order(gradients: dict[str, Tensor], ctx: Any) -> tuple[Any, ...]:
    """Return the gradients in the order of the operation's arguments; of a list, a list."""
    return (*(gradients.get(name) for name in "xwb"), [None] * ctx.constants, None, None)


_operation.register_autograd(_backward, setup_context=_save)


def sorted_distance(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    **keywords: Unpack[Keywords],
) -> Tensor:
    """Return Σ_r |p_(r) − q_(r)| of each row, p and q sorted and the shorter one padded with zeros.

    Differentiable in `student_ND`, the student head's weight and its bias. Nothing reaches the teacher.

    Args:
        student_ND: the student's hidden states; bfloat16, float16, float32, or float64.
        student_head: weight and bias of the dtype and device of `student_ND`; may be one rank's shard.
        teacher_NE: the teacher's hidden states, row by row what the student's are compared with.
        teacher_head: the teacher's head; may be sharded as well.
        **keywords:
            temperature: divides the logits of both, after the softcap; > 0; 1.
            exact: sort (True, needs whole heads) or count in bins (False); None: sort where both heads are
                whole and hold 8192 ids at most, on a CPU also larger ones, unless that takes a second dW.
            row_weight_N: number of each row, no gradient to it: the result is Σ_n row_weight[n] value[n],
                and its gradients are formed in the forward where a second dW fits `workspace_bytes`.
            workspace_bytes: bound on what is allocated beside results and O(N·D), one row at least; 1 GiB.

    Returns:
        value_N in [0, 2], or the weighted sum; float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, dtypes, devices or numbers do not fit together, or (on a CPU) if a logit is
            NaN or infinite.

    Precision: logits, sums and hidden gradients are float32. In bins the value is at most `error_bound` too
    small: in rows of 152k against 128k ids mostly 1e-6, but 1e-4 where a few ids hold most of the mass and
    cross inside a bin, and 1e-3 in flat rows, whose gradient is far off (docs/kernels.md, "Errors").
    Bitwise repeatable: the atomics add integers. Ranks that share a head add up 24 KB per row (they could
    not merge sorts).
    """
    if unknown := keywords.keys() - Keywords.__annotations__.keys():
        raise TypeError(f"sorted_distance has no argument {min(unknown)!r}")
    temperature, exact = keywords.get("temperature", 1.0), keywords.get("exact")
    row_weight_N = keywords.get("row_weight_N")
    workspace_bytes = keywords.get("workspace_bytes", DEFAULT_WORKSPACE_BYTES)
    heads = (student_head, teacher_head)
    _check(student_ND, student_head, teacher_NE, teacher_head, row_weight_N, temperature)
    refuse_forward_mode(student_ND, student_head.weight_VD, student_head.bias_V)
    if exact and any(head.shard is not None for head in heads):
        raise ValueError(
            "exact=True sorts whole rows, and a head was given as a shard: gather it, or leave exact out "
            "(ranks add up histograms)"
        )
    needs = wanted(student_ND, student_head.weight_VD, student_head.bias_V)
    how = row_weight_N is not None, student_head.weight_VD, workspace_bytes
    exact = sorts(exact, heads, _mode(needs, False, *how) == "tables")
    mode = _mode(needs, exact, *how)
    packed = pack(
        mode=mode,
        exact=exact,
        needs=needs,
        workspace_bytes=workspace_bytes,
        temperature=float(temperature),
        row_weight_N=row_weight_N,
        teacher_NE=teacher_NE,
        student_head=head_fields(student_head, tensors=False),
        teacher_head=head_fields(teacher_head),
    )
    return _operation(student_ND, student_head.weight_VD, student_head.bias_V, *packed)[0]


def _mode(needs: str, exact: bool, weighted: bool, weight_VD: Tensor, workspace_bytes: int) -> str:
    if not needs:
        return "values"
    if exact:
        return "formed" if weighted or needs == "x" else "replay"
    second_bytes = 0
    if "w" in needs:  # in float32 beside the chunks of the forward, or beside the one that is returned
        itemsize = weight_VD.dtype.itemsize
        second_bytes = (8 if itemsize == 2 else itemsize) * weight_VD.numel()
    return "formed" if needs == "x" or (weighted and second_bytes <= workspace_bytes) else "tables"


def error_bound(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """Return by how much `sorted_distance` may be too small in each row, float32; no gradient.

    In a bin that D enters at D₀, with c_p and c_q probabilities inside, D stays in [−b, a], a = D₀ + c_p and
    b = c_q − D₀; the signed integral S = w (D₀ + f) is known, so the smaller of the areas on either side of
    zero is at most (w a b − (b where S > 0, else a) |S|) / (a + b), and counting it twice is what is missed.
    Rounding (1e-6) comes on top. Takes the arguments of `sorted_distance`, whole heads, and its time.

    Raises:
        ValueError: as `sorted_distance`; and for a sharded head.
    """
    _check(student_ND, student_head, teacher_NE, teacher_head, None, temperature)
    if student_head.shard is not None or teacher_head.shard is not None:
        raise ValueError("error_bound takes whole heads, and one was given as a shard: gather it first")
    student = side_of("student_ND", student_ND.detach(), student_head, temperature)
    teacher = side_of("teacher_NE", teacher_NE.detach(), teacher_head, temperature)
    with torch.no_grad(), torch.autocast(student_ND.device.type, enabled=False):
        return run_bounds(student, teacher, workspace_bytes)


def _check(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    row_weight_N: Tensor | None,
    temperature: float,
) -> None:
    check_side("student_ND", student_ND, student_head, "student_head")
    check_side("teacher_NE", teacher_NE, teacher_head, "teacher_head")
    if student_ND.shape[0] != teacher_NE.shape[0]:
        raise ValueError(
            "student_ND and teacher_NE must hold the same rows: "
            f"got {student_ND.shape[0]} and {teacher_NE.shape[0]}"
        )
    if student_ND.device != teacher_NE.device:
        raise ValueError(
            "student_ND and teacher_NE must be on one device: "
            f"got {student_ND.device} and {teacher_NE.device}"
        )
    if (student_ND.dtype == torch.float64) != (teacher_NE.dtype == torch.float64):
        raise ValueError(
            "student_ND and teacher_NE must both be float64 or neither: "
            f"got {student_ND.dtype} and {teacher_NE.dtype}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive: got {temperature}")
    if row_weight_N is not None:
        check_row_weight(row_weight_N, student_ND)
