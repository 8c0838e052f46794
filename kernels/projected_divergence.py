"""KL between a teacher and a student whose probabilities are carried into the teacher's vocabulary.

    r_w  = Σ_v P[w, v] p_v                          p = softmax(z_s / T): P is sparse, a fixed projection
    value = Σ_w q_w (log q_w − log r_w) + log Σ_w r_w       q = softmax of z_t / (T T_teacher)
    ∂value / ∂z_s,v = p_v (Σ_w P[w, v] (1 / Σ r − q_w / r_w)) / T

Both distributions are over the teacher's ids that some student id is carried to. A few whole rows of both
models' logits exist at a time, as many as fit into `workspace_bytes`; because the weights of the rows are
known, gradients are formed on the way and no logits are computed twice. On a GPU three kernels make dz of the
logits: P's rows are added up where p is read, the two distributions meet, and Pᵀ's rows where dz is written.

Dimensions: N tokens (of a chunk), V student vocabulary, W teacher vocabulary, D and E hidden sizes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head.call import head_fields, head_of, pack, unpack, wanted
from tokenkit.kernels.head.formed import formed_shapes, register_formed
from tokenkit.kernels.head.logits import base_triton, row_sums, slope, slope_triton
from tokenkit.kernels.head.products import Gradients
from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.head.side import Side, check_hidden, side_of
from tokenkit.kernels.head.tiles import Buffer, grouped
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, runs_triton
from tokenkit.kernels.linear_divergence.checks import check_sides
from tokenkit.kernels.linear_logprob import DEFAULT_WORKSPACE_BYTES
from tokenkit.structs import Head

BLOCK = 1024  # ids of one program


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
    student: Side
    teacher: Side
    projection: Projection
    row_weight_N: Tensor
    needs: str
    """Which gradients: x hidden states, w weight, b bias."""
    workspace_bytes: int


@triton.jit
def _carry_kernel(
    z_ptr, max_ptr, sum_ptr, begin_ptr, column_ptr, weight_ptr, r_ptr,
    stride, r_stride, W,
    alpha, tiny,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program per row and block of teacher ids: r, at least `tiny` where an id is reached, else 0."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = offs_w < W
    first = tl.load(begin_ptr + offs_w, mask=mask, other=0)
    count = tl.load(begin_ptr + offs_w + 1, mask=mask, other=0) - first
    m = tl.load(max_ptr + n)
    total = tl.zeros((BLOCK_W,), tl.float32)
    for k in range(0, tl.max(count, axis=0)):
        live = mask & (k < count)
        v = tl.load(column_ptr + first + k, mask=live, other=0)
        z = tl.load(z_ptr + n * stride + v, mask=live, other=0.0) * alpha
        total += tl.where(live, tl.load(weight_ptr + first + k, mask=live, other=0.0) * tl.exp(z - m), 0.0)
    r = tl.where(count > 0, tl.maximum(total / tl.load(sum_ptr + n), tiny), 0.0)
    tl.store(r_ptr + n * r_stride + offs_w, r, mask=mask)


@triton.jit
def _compare_kernel(z_ptr, r_ptr, value_ptr, stride, r_stride, W, alpha, BLOCK_W: tl.constexpr):
    """One program per row: the value, and over r what pulls at it, 1 / Σ r − q / r."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    m = float("-inf")
    s = 0.0
    mass = 0.0
    for start in range(0, W, BLOCK_W):
        offs_w = start + tl.arange(0, BLOCK_W)
        r = tl.load(r_ptr + n * r_stride + offs_w, mask=offs_w < W, other=0.0)
        z = tl.load(z_ptr + n * stride + offs_w, mask=offs_w < W, other=0.0) * alpha
        z = tl.where(r > 0, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, axis=0))
        base = base_triton(m_new)
        s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base), axis=0)
        m = m_new
        mass += tl.sum(r, axis=0)
    value = tl.log(mass)
    log_s = tl.log(s)
    for start in range(0, W, BLOCK_W):
        offs_w = start + tl.arange(0, BLOCK_W)
        r = tl.load(r_ptr + n * r_stride + offs_w, mask=offs_w < W, other=0.0)
        z = tl.load(z_ptr + n * stride + offs_w, mask=offs_w < W, other=0.0) * alpha
        reached = r > 0
        log_q = tl.where(reached, z - m - log_s, 0.0)
        q = tl.exp(log_q)
        safe = tl.where(reached, r, 1.0)
        value += tl.sum(tl.where(reached, q * (log_q - tl.log(safe)), 0.0), axis=0)
        pull = tl.where(reached, 1.0 / mass - q / safe, 0.0)
        tl.store(r_ptr + n * r_stride + offs_w, pull, mask=offs_w < W)
    tl.store(value_ptr + n, value)


@triton.jit
def _pull_kernel(
    z_ptr, max_ptr, sum_ptr, begin_ptr, column_ptr, weight_ptr, pull_ptr, factor_ptr, dz_ptr,
    stride, pull_stride, dz_stride, V,
    alpha, cap,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and block of student ids: dz, what pulls at the teacher ids that an id reaches."""
    n = tl.program_id(0).to(tl.int64)  # n * stride passes 2**31 at 16k rows of 150k words
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    first = tl.load(begin_ptr + offs_v, mask=mask, other=0)
    count = tl.load(begin_ptr + offs_v + 1, mask=mask, other=0) - first
    total = tl.zeros((BLOCK_V,), tl.float32)
    for k in range(0, tl.max(count, axis=0)):
        live = mask & (k < count)
        w = tl.load(column_ptr + first + k, mask=live, other=0)
        pull = tl.load(pull_ptr + n * pull_stride + w, mask=live, other=0.0)
        total += tl.load(weight_ptr + first + k, mask=live, other=0.0) * pull
    z = tl.load(z_ptr + n * stride + offs_v, mask=mask, other=0.0) * alpha
    p = tl.exp(z - tl.load(max_ptr + n)) / tl.load(sum_ptr + n)
    dz = p * total * tl.load(factor_ptr + n) * slope_triton(z, cap)
    tl.store(dz_ptr + n * dz_stride + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _chunk(plan: _Plan, rows: slice, buffer: Buffer, dz_NV: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the value of each row of a chunk, and ∂/∂z_s times its weight, in dz_NV if it is given."""
    student, teacher = plan.student, plan.teacher
    factor_N = plan.row_weight_N[rows].to(student.dtype) * student.alpha
    (z_NV, alpha), (z_NW, teacher_alpha) = (side.logits(buffer, rows) for side in (student, teacher))
    if not runs_triton(z_NV):
        return _chunk_torch(z_NV, z_NW, factor_N, plan)
    N, V = z_NV.shape
    W = z_NW.shape[1]
    dz_NV = z_NV if dz_NV is None else dz_NV
    value_N = torch.empty_like(factor_N)
    max_N, sum_N = row_sums(z_NV, alpha)
    r_NW = buffer.get("carried", N, W, student.dtype)
    with on_device(z_NV):
        _carry_kernel[(N, triton.cdiv(W, BLOCK))](
            z_NV, max_N, sum_N, *plan.projection.into_teacher, r_NW,
            z_NV.stride(0), r_NW.stride(0), W, alpha, torch.finfo(torch.float32).tiny, BLOCK_W=BLOCK,
        )  # fmt: skip
        _compare_kernel[(N,)](
            z_NW, r_NW, value_N, z_NW.stride(0), r_NW.stride(0), W, teacher_alpha, BLOCK_W=BLOCK
        )
        _pull_kernel[(N, triton.cdiv(V, BLOCK))](
            z_NV, max_N, sum_N, *plan.projection.into_student, r_NW, factor_N, dz_NV,
            z_NV.stride(0), r_NW.stride(0), dz_NV.stride(0), V, alpha, student.cap, BLOCK_V=BLOCK,
        )  # fmt: skip
    return value_N, dz_NV


def _chunk_torch(z_NV: Tensor, z_NW: Tensor, factor_N: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """`_chunk` in torch; dz overwrites z_NV's memory."""
    slope_NV = None if plan.student.cap is None else slope(z_NV, plan.student.cap)
    dtype, reached_W = z_NV.dtype, plan.projection.into_teacher[0].diff() > 0
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
    dz_NV = p_NV.mul_((into_student @ pull_NW.T).T).mul_(factor_N[:, None])
    return value_N, dz_NV if slope_NV is None else dz_NV.mul_(slope_NV)


def _run(plan: _Plan) -> tuple[Tensor, list[Tensor | None]]:
    """Return the weighted sum and the gradients of hidden states, weight and bias, where they are wanted."""
    student, teacher = plan.student, plan.teacher
    check_hidden("student_ND", student.hidden_ND)
    check_hidden("teacher_NE", teacher.hidden_ND)
    W, V = plan.projection.shape
    total = torch.zeros((), dtype=student.dtype, device=student.hidden_ND.device)
    gradients, buffer = Gradients(student, plan.needs), Buffer(student.hidden_ND)
    size = student.dtype.itemsize
    row_bytes = size * (V + 2 * W) if runs_triton(student.hidden_ND) else size * (3 * V + 7 * W)
    low_bytes = 0 if student.low == student.dtype else V * student.low.itemsize
    for group in grouped(len(student.hidden_ND), row_bytes, low_bytes, plan.workspace_bytes):
        whole = slice(group[0].start, group[-1].stop)
        waiting_NV = buffer.get("dz", whole.stop - whole.start, V, student.low) if low_bytes else None
        for rows in group:
            here_NV = (
                None if waiting_NV is None else waiting_NV[rows.start - whole.start : rows.stop - whole.start]
            )
            value_N, dz_NV = _chunk(plan, rows, buffer, here_NV)
            total += (plan.row_weight_N[rows] * value_N).sum()
        if plan.needs:
            gradients.add(dz_NV if waiting_NV is None else waiting_NV, student.rows, whole)
    return total, gradients.results()


@torch.library.custom_op(
    "tokenkit::projected_divergence",
    mutates_args=(),
    schema="(Tensor student, Tensor weight, Tensor? bias, Tensor[] constants, float[] numbers, str words) "
    "-> Tensor[]",
)
def _divergence(student: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any) -> Any:
    """Return the weighted sum, then a gradient for each of student, weight and bias, empty where unwanted."""
    call = unpack(*packed)
    own, other = head_of(call["student_head"], weight, bias), head_of(call["teacher_head"])
    projection = Projection(*(tuple(call[name].values()) for name in Projection._fields))
    temperature = call["temperature"]
    plan = _Plan(
        side_of("student_ND", student, own, temperature),
        side_of("teacher_NE", call["teacher_NE"], other, temperature * call["teacher_temperature"]),
        projection,
        call["row_weight_N"],
        call["needs"],
        call["workspace_bytes"],
    )
    with torch.autocast(student.device.type, enabled=False):
        total, gradients = _run(plan)
    return [total, *(total.new_empty(0) if x is None else x for x in gradients)]


@_divergence.register_fake
def _(student: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any) -> Any:
    return formed_shapes((student, weight, bias), unpack(*packed)["needs"], "xwb")


register_formed(_divergence, "projected_divergence", 3)


def projected_divergence(
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    projection: Projection,
    row_weight_N: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """Return Σ row_weight · value over the rows; differentiable in student_ND and the student's head.

    Args:
        student_ND: the student's hidden states.
        student_head: of their dtype and device; not divided over processes.
        teacher_NE: the teacher's, as many; no gradient flows into them.
        teacher_head: of their dtype and device; not divided over processes.
        projection: from the student's vocabulary into the teacher's, on that device.
        row_weight_N: weight of each row.
        temperature: T, which divides both models' logits.
        teacher_temperature: multiplies it for the teacher.
        workspace_bytes: for logits and what is made of them.

    Returns:
        nats, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, a divided
            head, a teacher's head that requires a gradient, or (on a CPU) hidden states that are not finite.

    Precision: logits, probabilities and sums are float32; a carried probability below the smallest float32
    counts as that. Bitwise repeatable: an id's entries are added in their order.
    """
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite: got {value}")
    W, V = projection.shape
    for name, head, size in (("student", student_head, V), ("teacher", teacher_head, W)):
        if head.shard is not None:
            raise ValueError(
                f"the {name}'s head is divided over processes: projected_divergence needs it whole"
            )
        if vocab_size(head) != size:
            raise ValueError(
                f"projection must have {vocab_size(head)} ids of the {name}, as its head has: got {size}"
            )
    check_sides(student_ND, student_head, teacher_NE, teacher_head, {"row_weight_N": row_weight_N})
    tensors = (student_ND, student_head.weight_VD, student_head.bias_V)
    packed = pack(
        needs=wanted(*tensors),
        temperature=float(temperature),
        teacher_temperature=float(teacher_temperature),
        workspace_bytes=workspace_bytes,
        row_weight_N=row_weight_N,
        teacher_NE=teacher_NE,
        student_head=head_fields(student_head, tensors=False),
        teacher_head=head_fields(teacher_head),
        **{name: {str(i): x for i, x in enumerate(parts)} for name, parts in projection._asdict().items()},
    )
    return _divergence(*tensors, *packed)[0]
