"""The two ways through the logits of a divergence.

    by_chunks    a few whole rows of both models at a time: values, and gradients where row weights are known
    by_tiles     all rows, a tile of columns at a time: gradients from the numbers that by_chunks kept

`by_tiles` sums each row of dW over all tokens in one GEMM, rounded once; `by_chunks` adds up dW in float32.
On a GPU the dz of several chunks wait in 16 bits for one GEMM, because one of a few hundred tokens is slow.

Dimensions: N tokens, V columns, D student and E teacher hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels import divergence_tile as tile
from tokenkit.kernels import launch
from tokenkit.kernels.divergence_rows import (
    Logits,
    Problem,
    RowState,
    Seen,
    Side,
    row_state,
    seen,
    write_gradient,
    write_rest_gradient,
)
from tokenkit.kernels.row_chunks import (
    Rows,
    add_hidden_gradient,
    add_weight_gradient,
    chunks,
    number_of,
    part_of,
    write_products,
    write_weight_gradient,
)
from tokenkit.kernels.vocabulary_parallel import reduce_sum

TILE_BYTES = 128 * 2**20  # of one model's float32 tile, on a GPU: 4096 columns at 8192 tokens
CPU_TILE_BYTES = 4 * 2**20
CPU_CHUNK_BYTES = 256 * 2**20
COLUMNS = (128, 8192)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    student: bool
    weight: bool
    bias: bool
    teacher: bool


class Gradients(NamedTuple):
    """Sums in float32 (float64), but `weight_VD`, which may be of the weight's dtype; None: not wanted."""

    student_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    teacher_NE: Tensor | None


class Buffer:
    """Memory that every tile reuses: a fresh allocation of a tile costs a CPU its page faults again."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return [rows, columns], contiguous, uninitialised."""
        flat = self.kept.get((name, dtype))
        if flat is None or flat.numel() < rows * columns:
            self.kept[name, dtype] = flat = self.like.new_empty(rows * columns, dtype=dtype)
        return flat[: rows * columns].view(rows, columns)


def low_dtype(side: Side, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which dz enters a GEMM."""
    return launch.low_dtype(side.hidden_ND, dtype)


def _chunks(problem: Problem, workspace_bytes: int, *, train: Needs | None) -> list[list[slice]]:
    """Return groups of chunks: each group's dz enters the GEMMs together."""
    student, teacher, size = problem.student, problem.teacher, problem.dtype.itemsize
    N, shard = len(student.hidden_ND), student.head.shard
    columns = number_of(student.rows), number_of(teacher.rows)
    if shard is not None:  # every process must cut alike, whatever rows it holds
        whole = student.head.vocab_size or 0
        columns = (-(-whole // shard.group.size()),) * 2
    if not student.hidden_ND.is_cuda:
        workspace_bytes = min(workspace_bytes, CPU_CHUNK_BYTES)
    row_bytes = size * sum(columns)
    if train is not None and train.teacher:
        row_bytes += columns[1] * low_dtype(teacher, problem.dtype).itemsize
    if train is None or low_dtype(student, problem.dtype) == problem.dtype:
        return [[rows] for rows in chunks(N, row_bytes, workspace_bytes)]
    low_bytes = columns[0] * low_dtype(student, problem.dtype).itemsize
    groups = chunks(N, low_bytes, workspace_bytes // 2)
    return [
        [
            slice(group.start + rows.start, group.start + rows.stop)
            for rows in chunks(group.stop - group.start, row_bytes, workspace_bytes // 2)
        ]
        for group in groups
    ]


def by_chunks(
    problem: Problem, upstream_N: Tensor | None, needs: Needs, workspace_bytes: int, *, train_teacher: bool
) -> tuple[Tensor, RowState, Gradients]:
    """Return the value and the numbers of every row, and, where `upstream_N` is known, the gradients.

    Args:
        problem: the divergence.
        upstream_N: the gradient of each row's value.
        needs: which gradients are wanted.
        workspace_bytes: bound on the buffers.
        train_teacher: whether the numbers must serve a gradient of the teacher later.
    """
    student, teacher, dtype = problem.student, problem.teacher, problem.dtype
    groups = _chunks(problem, workspace_bytes, train=None if upstream_N is None else needs)
    N = len(student.hidden_ND)
    value_N = student.hidden_ND.new_zeros(N, dtype=dtype)
    state = RowState(*student.hidden_ND.new_zeros((len(RowState._fields), N), dtype=dtype).unbind())
    gradients = _Sums(problem, needs, many=len(groups) > 1) if upstream_N is not None else None
    buffer, low = Buffer(student.hidden_ND), low_dtype(student, dtype)
    columns = number_of(student.rows)
    for group in groups:
        whole = slice(group[0].start, group[-1].stop)
        dz_NV = None
        if gradients is not None and low != dtype:
            dz_NV = buffer.get("dz", whole.stop - whole.start, columns, low)
        for rows in group:
            logits = _logits(problem, rows, (student.rows, teacher.rows), buffer)
            value_N[rows], some = row_state(problem, logits, train_teacher=train_teacher)
            for field, part in zip(state, some, strict=True):
                field[rows] = part
            if gradients is None or upstream_N is None:
                continue
            if needs.teacher:
                view = seen(problem, some, by_teacher=True)
                dz_teacher = buffer.get(
                    "dz teacher", len(logits.teacher_NV), number_of(teacher.rows), low_dtype(teacher, dtype)
                )
                _write_row_gradients(problem, view, upstream_N[rows], logits, dz_teacher)
                gradients.add_teacher(dz_teacher, teacher.rows, rows)
            dz = logits.student_NV
            if dz_NV is not None:
                dz = dz_NV[rows.start - whole.start : rows.stop - whole.start]
            if needs.student or needs.weight or needs.bias:
                _write_row_gradients(
                    problem, seen(problem, some, by_teacher=False), upstream_N[rows], logits, dz
                )
        if gradients is not None:
            gradients.add_student(dz if dz_NV is None else dz_NV, student.rows, whole)
    return value_N, state, _NONE if gradients is None else gradients.result()


def _write_row_gradients(
    problem: Problem, view: Seen, upstream_N: Tensor, logits: Logits, dz_NV: Tensor
) -> None:
    """Write dz of every column of one model; dz_NV may be its logits."""
    P = problem.pairs
    z_NV, alpha = logits.student_NV, logits.alpha
    if view.side is problem.teacher:
        z_NV, alpha = logits.teacher_NV, logits.teacher_alpha
    pairs = logits._replace(student_NV=logits.student_NV[:, :P], teacher_NV=logits.teacher_NV[:, :P])
    write_rest_gradient(view, upstream_N, z_NV[:, P:], alpha, dz_NV[:, P:])
    write_gradient(problem, view, upstream_N, pairs, slice(0, P), dz_NV[:, :P])


def by_tiles(
    problem: Problem, state: RowState, upstream_N: Tensor, needs: Needs, workspace_bytes: int
) -> Gradients:
    """Return the gradients from the numbers of every row.

    Args:
        problem: the divergence.
        state: what `by_chunks` returned.
        upstream_N: the gradient of each row's value.
        needs: which gradients are wanted.
        workspace_bytes: bound on the buffers, but a tile has 128 columns at least.
    """
    student, teacher, dtype = problem.student, problem.teacher, problem.dtype
    sums = _Sums(problem, needs, many=False)
    N = len(student.hidden_ND)
    every, buffer = slice(0, N), Buffer(student.hidden_ND)
    step, P = _columns(problem, workspace_bytes), problem.pairs
    views = [seen(problem, state, by_teacher=by_teacher) for by_teacher in (False, True)]
    for start in range(0, P if N else 0, step):
        columns = slice(start, min(start + step, P))
        parts = [part_of(side.rows, columns.start, columns.stop) for side in (student, teacher)]
        logits = _logits(problem, every, (parts[0], parts[1]), buffer, columns)
        if needs.teacher:
            dz = buffer.get("dz teacher", N, columns.stop - columns.start, low_dtype(teacher, dtype))
            write_gradient(problem, views[1], upstream_N, logits, columns, dz)
            sums.add_teacher(dz, parts[1], every)
        if needs.student or needs.weight or needs.bias:
            dz = logits.student_NV
            if low_dtype(student, dtype) != dtype:
                dz = buffer.get("dz", N, columns.stop - columns.start, low_dtype(student, dtype))
            write_gradient(problem, views[0], upstream_N, logits, columns, dz)
            sums.add_student(dz, parts[0], every)
    for view, add in ((views[0], sums.add_student), (views[1], sums.add_teacher)):
        if view.side is teacher and not needs.teacher:
            continue
        last = number_of(view.side.rows)
        for start in range(P, last if N else 0, step):
            columns = slice(start, min(start + step, last))
            rows = part_of(view.side.rows, columns.start, columns.stop)
            z_NV = buffer.get("z", N, columns.stop - columns.start, dtype)
            alpha = _write_logits(view.side, every, rows, columns, z_NV)
            low = low_dtype(view.side, dtype)
            dz = z_NV if low == dtype else buffer.get("dz", N, columns.stop - columns.start, low)
            write_rest_gradient(view, upstream_N, z_NV, alpha, dz)
            add(dz, rows, every)
    return sums.result()


def _columns(problem: Problem, workspace_bytes: int) -> int:
    hidden_ND = problem.student.hidden_ND
    limit = min(TILE_BYTES if hidden_ND.is_cuda else CPU_TILE_BYTES, workspace_bytes // 3)
    fewest, most = COLUMNS
    columns = limit // (max(len(hidden_ND), 1) * problem.dtype.itemsize) // fewest * fewest
    return min(max(columns, fewest), most)


def _logits(
    problem: Problem, rows: slice, heads: tuple[Rows, Rows], buffer: Buffer, columns: slice | None = None
) -> Logits:
    """Return both models' logits of some tokens and columns."""
    found = []
    for name, side, head_rows in zip(
        ("z", "z teacher"), (problem.student, problem.teacher), heads, strict=True
    ):
        z_NV = buffer.get(name, rows.stop - rows.start, number_of(head_rows), problem.dtype)
        found.append((z_NV, _write_logits(side, rows, head_rows, columns, z_NV)))
    (student_NV, alpha), (teacher_NV, teacher_alpha) = found
    return Logits(student_NV, teacher_NV, alpha, teacher_alpha)


def _write_logits(side: Side, tokens: slice, rows: Rows, columns: slice | None, z_NV: Tensor) -> float:
    """Write one model's logits; return the factor that is left to their reader."""
    write_products(side.hidden_ND[tokens], side.head.weight_VD, rows, z_NV)
    bias_V = side.bias_V if side.bias_V is None or columns is None else side.bias_V[columns]
    return tile.finish(z_NV, bias_V, side.alpha, side.cap)


class _Sums:
    """Gradients while they are added up."""

    def __init__(self, problem: Problem, needs: Needs, *, many: bool) -> None:
        self.problem, self.needs = problem, needs
        dtype, student, teacher = problem.dtype, problem.student, problem.teacher
        weight_VD = student.head.weight_VD
        self.adds = many or problem.repeats
        """Whether a row of dW gets more than one addend, so that their sum must be float32."""
        weight_dtype = dtype if self.adds else weight_VD.dtype
        self.student_ND = torch.zeros_like(student.hidden_ND, dtype=dtype) if needs.student else None
        self.teacher_NE = torch.zeros_like(teacher.hidden_ND, dtype=dtype) if needs.teacher else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=weight_dtype) if needs.weight else None
        self.bias_V = weight_VD.new_zeros(len(weight_VD), dtype=dtype) if needs.bias else None

    def add_student(self, dz_NV: Tensor, rows: Rows, tokens: slice) -> None:
        """Add what dz of some of the student's columns and tokens pulls."""
        student, weight_VD = self.problem.student, self.problem.student.head.weight_VD
        if self.student_ND is not None:
            add_hidden_gradient(dz_NV, weight_VD, rows, self.student_ND[tokens])
        if self.weight_VD is not None:
            write = add_weight_gradient if self.adds else write_weight_gradient
            write(dz_NV, student.hidden_ND[tokens], rows, self.weight_VD)
        if self.bias_V is not None:
            db_V = dz_NV.sum(0, dtype=self.problem.dtype)
            if isinstance(rows, slice):
                self.bias_V[rows] += db_V
            elif db_V.is_cuda:
                self.bias_V.index_put_((rows,), db_V, accumulate=True)  # sorts: no atomics
            else:
                self.bias_V.index_add_(0, rows, db_V)

    def add_teacher(self, dz_NV: Tensor, rows: Rows, tokens: slice) -> None:
        """Add what dz of some of the teacher's columns and tokens pulls; its head is frozen."""
        if self.teacher_NE is not None:
            weight_WE = self.problem.teacher.head.weight_VD
            add_hidden_gradient(dz_NV, weight_WE, rows, self.teacher_NE[tokens])

    def result(self) -> Gradients:
        """Return the sums over this process's columns; those of hidden states over all processes'."""
        head = self.problem.student.head
        for total in (self.student_ND, self.teacher_NE):
            if total is not None:
                reduce_sum(total, head)
        return Gradients(self.student_ND, self.weight_VD, self.bias_V, self.teacher_NE)


_NONE = Gradients(None, None, None, None)
