"""KL between a teacher and a student whose probabilities are carried into the teacher's vocabulary.

    r_w  = Σ_v P[w, v] p_v                          p = softmax(z_s / T): P is sparse, a fixed projection
    value = Σ_w q_w (log q_w − log r_w) + log Σ_w r_w       q = softmax of z_t / (T T_teacher)
    ∂value / ∂z_s,v = p_v (Σ_w P[w, v] (1 / Σ r − q_w / r_w)) / T

Both distributions are over the teacher's ids that some student id is carried to. A few whole rows of both
models' logits exist at a time, as many as fit into `workspace_bytes`; because the weights of the rows are
known, gradients are formed on the way and no logits are computed twice.

Dimensions: N tokens (of a chunk), V student vocabulary, W teacher vocabulary, D and E hidden sizes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels import row_chunks
from tokenkit.kernels.divergence_checks import check_hidden, check_sides
from tokenkit.kernels.launch import runs_triton
from tokenkit.kernels.linear_logprob import DEFAULT_WORKSPACE_BYTES
from tokenkit.structs import Head


class Projection(NamedTuple):
    """A sparse matrix from the student's vocabulary to the teacher's, and its transpose.

    Plain tensors, because a graph of `torch.compile` takes no sparse ones.
    """

    into_teacher: tuple[Tensor, Tensor, Tensor]
    """Compressed rows: where each teacher id's entries begin, their student ids, their float32 weights."""
    into_student: tuple[Tensor, Tensor, Tensor]
    """The same of the transpose."""
    shape: tuple[int, int]
    """W, V."""

    def to(self, device: torch.device | str) -> Projection:
        """Return the same projection on `device`."""
        first, second = ([part.to(device) for part in parts] for parts in self[:2])
        return Projection((first[0], first[1], first[2]), (second[0], second[1], second[2]), self.shape)

    def dense(self) -> Tensor:
        """Return the matrix [W, V], for small vocabularies."""
        return _sparse(self.into_teacher, self.shape, torch.float32).to_dense()


def _sparse(parts: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # of torch: in beta, and unchecked, as ids are when made
        return torch.sparse_csr_tensor(parts[0], parts[1], parts[2].to(dtype), shape, check_invariants=False)


def _parts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = matrix.coalesce().to_sparse_csr()
    # copies: these are views of the sparse tensor, and a graph would see that
    return matrix.crow_indices().clone(), matrix.col_indices().clone(), matrix.values().clone()


def make_projection(
    student_M: Tensor, teacher_M: Tensor, weight_M: Tensor, vocab_size: int, teacher_vocab_size: int
) -> Projection:
    """Return the projection whose entries are weight_M at (teacher_M, student_M).

    Args:
        student_M: int64 student ids; with teacher_M, each pair of ids once.
        teacher_M: int64 teacher ids.
        weight_M: positive weights.
        vocab_size: of the student.
        teacher_vocab_size: of the teacher.

    Raises:
        ValueError: no entry, an id out of range, a weight that is not positive.
    """
    if not len(student_M) == len(teacher_M) == len(weight_M) > 0:
        raise ValueError(
            "a projection needs entries, with one student id, teacher id and weight each: got "
            f"{len(student_M)}, {len(teacher_M)} and {len(weight_M)}"
        )
    for name, index_M, size in (
        ("student_M", student_M, vocab_size),
        ("teacher_M", teacher_M, teacher_vocab_size),
    ):
        if int(index_M.min()) < 0 or int(index_M.max()) >= size:
            raise ValueError(
                f"{name} must hold ids in [0, {size}): got {int(index_M.min())} to {int(index_M.max())}"
            )
    if not bool((weight_M > 0).all()):
        raise ValueError(f"weight_M must be positive: got {float(weight_M.min())}")
    index, shape = torch.stack([teacher_M, student_M]), (teacher_vocab_size, vocab_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # of torch: in beta, and unchecked, as ids are above
        matrix = torch.sparse_coo_tensor(index, weight_M.float(), shape).coalesce()
        return Projection(_parts(matrix), _parts(matrix.t()), shape)


class _Plan(NamedTuple):
    student_head: Head
    teacher_head: Head
    projection: Projection
    temperature: float
    teacher_temperature: float
    workspace_bytes: int
    trains: tuple[bool, bool, bool]
    """Whether hidden states, weight and bias of the student want a gradient."""


def _logits(hidden_ND: Tensor, head: Head, V: int, temperature: float, dtype: torch.dtype) -> Tensor:
    z_NV = torch.empty((len(hidden_ND), V), dtype=dtype, device=hidden_ND.device)
    row_chunks.write_products(hidden_ND, head.weight_VD, slice(0, V), z_NV)
    if head.bias_V is not None:
        z_NV += head.bias_V[:V]
    z_NV *= head.scale
    if head.softcap is not None:
        z_NV = z_NV.div_(head.softcap).tanh_().mul_(head.softcap)
    return z_NV.div_(temperature)


def _chunk(
    z_NV: Tensor, z_NW: Tensor, reached_W: Tensor, row_weight_N: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · value of a chunk and ∂/∂z_s, which overwrites z_NV's memory."""
    slope_NV = None
    if plan.student_head.softcap is not None:
        slope_NV = 1 - (z_NV * (plan.temperature / plan.student_head.softcap)).square()
    dtype = z_NV.dtype
    W, V = plan.projection.shape
    into_teacher = _sparse(plan.projection.into_teacher, (W, V), dtype)
    into_student = _sparse(plan.projection.into_student, (V, W), dtype)
    p_NV = z_NV.sub_(z_NV.logsumexp(1, keepdim=True)).exp_()
    tiny = torch.finfo(dtype).tiny
    # a teacher's token of which no float32 probability is left pulls with the largest number there is
    r_NW = torch.where(reached_W, (into_teacher @ p_NV.T).T.clamp_min(tiny), 0)
    mass_N1 = r_NW.sum(1, keepdim=True)
    log_q_NW = z_NW.masked_fill_(~reached_W, -torch.inf).log_softmax(1)
    q_NW = log_q_NW.exp()
    terms_NW = q_NW * (log_q_NW.where(reached_W, 0) - r_NW.where(reached_W, 1).log())
    value_N = terms_NW.sum(1) + mass_N1.log()[:, 0]
    pull_NW = torch.where(reached_W, 1 / mass_N1 - q_NW / r_NW.where(reached_W, 1), 0)
    factor_N1 = (row_weight_N * (plan.student_head.scale / plan.temperature))[:, None]
    dz_NV = p_NV.mul_((into_student @ pull_NW.T).T).mul_(factor_N1)
    return (row_weight_N * value_N).sum(), dz_NV if slope_NV is None else dz_NV.mul_(slope_NV)


@torch.library.custom_op(
    "tokenkit::projected_divergence",
    mutates_args=(),
    schema="(Tensor student, Tensor weight, Tensor? bias, Tensor teacher, Tensor[] constants, "
    "float[] numbers, bool[] trains) -> Tensor[]",
)
def _divergence(student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, *packed: Any) -> Any:
    """Return the weighted sum, then a gradient for each of student, weight and bias, empty where unwanted."""
    plan, row_weight_N = _unpack(weight, bias, *packed)
    with torch.autocast(student.device.type, enabled=False):
        total, gradients = _run(student, teacher, row_weight_N, plan)
    return [total, *(total.new_empty(0) if x is None else x for x in gradients)]


@_divergence.register_fake
def _(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    constants: Any,
    numbers: Any,
    trains: Any,
) -> Any:
    dtype = torch.promote_types(student.dtype, torch.float32)
    shapes = (student.shape, weight.shape, weight.shape[:1])
    wanted = [shape if wants else (0,) for shape, wants in zip(shapes, trains, strict=True)]
    return [student.new_empty(shape, dtype=dtype) for shape in ((), *wanted)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.lists, ctx.trains = len(inputs[4]), inputs[6]
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
    upstream, none = upstreams[0], [None] * ctx.lists
    if upstream is None:
        return None, None, None, None, none, None, None
    if torch.is_grad_enabled():
        raise RuntimeError(
            "projected_divergence has no second derivative: call backward without create_graph"
        )
    found = zip(ctx.saved_tensors, ctx.dtypes, ctx.trains, strict=True)
    return *((g * upstream).to(dtype) if wants else None for g, dtype, wants in found), None, none, None, None


_divergence.register_autograd(_gradients, setup_context=_keep)


def _pack(plan: _Plan, row_weight_N: Tensor) -> tuple[list[Tensor], list[float], list[bool]]:
    """Lay a plan out as what an operation may take."""
    head, projection = plan.teacher_head, plan.projection
    constants = [row_weight_N, head.weight_VD, *projection.into_teacher, *projection.into_student]
    constants += [] if head.bias_V is None else [head.bias_V]
    numbers = [*projection.shape, plan.temperature, plan.teacher_temperature, plan.workspace_bytes]
    for one in (plan.student_head, head):
        numbers += [0 if one.softcap is None else one.softcap, one.scale]
    return constants, [float(x) for x in numbers], list(plan.trains)


def _unpack(
    weight: Tensor, bias: Tensor | None, constants: list[Tensor], numbers: list[float], trains: list[bool]
) -> tuple[_Plan, Tensor]:
    row_weight_N, teacher_weight, *parts = constants
    W, V, temperature, teacher_temperature, workspace, softcap, scale, teacher_softcap, teacher_scale = (
        numbers
    )
    shape = (int(W), int(V))
    projection = Projection((parts[0], parts[1], parts[2]), (parts[3], parts[4], parts[5]), shape)
    teacher_bias = parts[6] if len(parts) > 6 else None
    plan = _Plan(
        Head(weight, bias, softcap or None, scale, shape[1]),
        Head(teacher_weight, teacher_bias, teacher_softcap or None, teacher_scale, shape[0]),
        projection,
        temperature,
        teacher_temperature,
        int(workspace),
        (trains[0], trains[1], trains[2]),
    )
    return plan, row_weight_N


def _run(
    student_ND: Tensor, teacher_NE: Tensor, row_weight_N: Tensor, plan: _Plan
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the weighted sum and the gradients of hidden states, weight and bias, where they are wanted."""
    head, teacher_head = plan.student_head, plan.teacher_head
    check_hidden("student_ND", student_ND)
    check_hidden("teacher_NE", teacher_NE)
    W, V = plan.projection.shape
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    reached_W = plan.projection.into_teacher[0].diff() > 0
    total = torch.zeros((), dtype=dtype, device=student_ND.device)
    shapes = (student_ND.shape, head.weight_VD.shape, head.weight_VD.shape[:1])
    gradients = [
        torch.zeros(shape, dtype=dtype, device=student_ND.device) if trains else None
        for shape, trains in zip(shapes, plan.trains, strict=True)
    ]
    dhidden_ND, dweight_VD, dbias_V = gradients
    low = student_ND.dtype if runs_triton(student_ND) else dtype
    row_bytes = dtype.itemsize * (3 * V + 7 * W)
    for rows in row_chunks.chunks(len(student_ND), row_bytes, plan.workspace_bytes):
        z_NV = _logits(student_ND[rows], head, V, plan.temperature, dtype)
        z_NW = _logits(teacher_NE[rows], teacher_head, W, plan.temperature * plan.teacher_temperature, dtype)
        value, dz_NV = _chunk(z_NV, z_NW, reached_W, row_weight_N[rows].to(dtype), plan)
        total += value
        if dbias_V is not None:
            dbias_V[:V] += dz_NV.sum(0)
        dz_NV = dz_NV.to(low)  # a GPU multiplies operands of one dtype
        if dhidden_ND is not None:
            row_chunks.add_hidden_gradient(dz_NV, head.weight_VD, slice(0, V), dhidden_ND[rows])
        if dweight_VD is not None:
            row_chunks.add_weight_gradient(dz_NV, student_ND[rows], slice(0, V), dweight_VD)
    return total, gradients


def projected_divergence(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    projection: Projection,
    row_weight_N: Tensor,
    **options: Any,
) -> Tensor:
    """Return Σ row_weight · value over the rows; differentiable in student_ND and the student's head.

    Args:
        student_ND: the student's hidden states.
        student_head: of their dtype and device; not divided over processes.
        teacher_NE: the teacher's, as many; no gradient flows into them.
        teacher_head: of their dtype and device; not divided over processes.
        projection: from the student's vocabulary into the teacher's, on that device.
        row_weight_N: weight of each row.
        options: `temperature` T (1), which divides both models' logits; `teacher_temperature` (1), which
            multiplies it for the teacher; `workspace_bytes`, for logits and what is made of them.

    Returns:
        nats, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, a divided
            head, a teacher's head that requires a gradient, or (on a CPU) hidden states that are not finite.

    Precision: logits, probabilities and sums are float32; a carried probability below the smallest float32
    counts as that.
    """
    temperature = options.pop("temperature", 1.0)
    teacher_temperature = options.pop("teacher_temperature", 1.0)
    workspace_bytes = options.pop("workspace_bytes", DEFAULT_WORKSPACE_BYTES)
    if options:
        raise TypeError(f"projected_divergence has no option {sorted(options)}")
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite: got {value}")
    W, V = projection.shape
    for name, head, size in (("student", student_head, V), ("teacher", teacher_head, W)):
        if head.shard is not None:
            raise ValueError(
                f"the {name}'s head is divided over processes: projected_divergence needs it whole"
            )
        has = head.weight_VD.shape[0] if head.vocab_size is None else head.vocab_size
        if has != size:
            raise ValueError(f"projection must have {has} ids of the {name}, as its head has: got {size}")
    check_sides(student_ND, student_head, teacher_NE, teacher_head, {"row_weight_N": row_weight_N})
    tensors = (student_ND, student_head.weight_VD, student_head.bias_V)
    trains = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
    plan = _Plan(
        student_head,
        teacher_head,
        projection,
        temperature,
        teacher_temperature,
        workspace_bytes,
        (trains[0], trains[1], trains[2]),
    )
    return _divergence(*tensors, teacher_NE.detach(), *_pack(plan, row_weight_N))[0]
