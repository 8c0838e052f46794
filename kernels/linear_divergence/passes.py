"""The two ways through the logits of a divergence.

    by_chunks    a few whole rows of both models at a time: values, and gradients where row weights are known
    by_tiles     all rows, a tile of columns at a time: gradients from the numbers that by_chunks kept

`by_tiles` sums each row of dW over all tokens in one GEMM, rounded once; `by_chunks` adds up dW in float32.
On a GPU the dz of several chunks wait in 16 bits for one GEMM, because one of a few hundred tokens is slow.

Dimensions: N tokens, V columns, D student and E teacher hidden size.
"""

from __future__ import annotations

from torch import Tensor

from tokenkit.kernels.head import tiles
from tokenkit.kernels.head.products import Gradients, part_of
from tokenkit.kernels.head.tiles import Buffer, chunks, grouped
from tokenkit.kernels.linear_divergence.rows import (
    Logits,
    RowState,
    Seen,
    row_state,
    seen,
    write_gradient,
    write_rest_gradient,
)
from tokenkit.kernels.linear_divergence.settings import CPU_CHUNK_BYTES, Problem

CPU_TILE_BYTES = 4 * 2**20  # of one model's tile
COLUMNS = tiles.COLUMNS


class Sums:
    """The gradients of both models; the teacher's head has none."""

    def __init__(self, problem: Problem, needs: str, *, many: bool) -> None:
        """Begin; `many`: a row of dW gets several addends even where no id repeats."""
        adds = many or problem.repeats
        self.student = Gradients(problem.student, needs, adds=adds)
        self.teacher = Gradients(problem.teacher, "x" if "t" in needs else "")
        self.has_student = any(letter in needs for letter in "xwb")

    def results(self) -> list[Tensor | None]:
        """Return those of student, weight, bias and teacher."""
        return [*self.student.results(), self.teacher.results(self.student.side.head)[0]]


def _chunks(problem: Problem, workspace_bytes: int, needs: str | None) -> list[list[slice]]:
    """Return groups of chunks: each group's dz enters the GEMMs together; None: no gradient is formed."""
    student, teacher, dtype = problem.student, problem.teacher, problem.dtype
    N, shard = len(student.hidden_ND), student.head.shard
    columns = student.columns, teacher.columns
    if shard is not None:  # every process must cut alike, whatever rows it holds
        whole = student.head.vocab_size or 0
        columns = (-(-whole // shard.group.size()),) * 2
    if not student.hidden_ND.is_cuda:
        workspace_bytes = min(workspace_bytes, CPU_CHUNK_BYTES)
    row_bytes = dtype.itemsize * sum(columns)
    if needs is not None and "t" in needs:
        row_bytes += columns[1] * teacher.low.itemsize
    if needs is None or student.low == dtype:
        return [[rows] for rows in chunks(N, row_bytes, workspace_bytes, rounded=student.low != dtype)]
    return grouped(N, row_bytes, columns[0] * student.low.itemsize, workspace_bytes)


def by_chunks(
    problem: Problem, upstream_N: Tensor | None, needs: str, workspace_bytes: int
) -> tuple[Tensor, RowState, list[Tensor | None]]:
    """Return the value and the numbers of every row, and, where `upstream_N` is known, the gradients.

    Args:
        problem: the divergence.
        upstream_N: the gradient of each row's value.
        needs: which gradients are wanted, now or later: x, w, b, t (the teacher's states).
        workspace_bytes: bound on the buffers.
    """
    student, teacher, dtype = problem.student, problem.teacher, problem.dtype
    groups = _chunks(problem, workspace_bytes, None if upstream_N is None else needs)
    N = len(student.hidden_ND)
    value_N = student.hidden_ND.new_zeros(N, dtype=dtype)
    state = RowState(*student.hidden_ND.new_zeros((len(RowState._fields), N), dtype=dtype).unbind())
    sums = Sums(problem, needs, many=len(groups) > 1) if upstream_N is not None else None
    buffer = Buffer(student.hidden_ND)
    for group in groups:
        whole = slice(group[0].start, group[-1].stop)
        dz_NV = None
        if sums is not None and student.low != dtype:
            dz_NV = buffer.get("dz", whole.stop - whole.start, student.columns, student.low)
        for rows in group:
            logits = _logits(problem, rows, buffer)
            value_N[rows], some = row_state(problem, logits, train_teacher="t" in needs)
            for field, part in zip(state, some, strict=True):
                field[rows] = part
            if sums is None or upstream_N is None:
                continue
            if "t" in needs:
                dz = buffer.get("dz teacher", len(logits.teacher_NV), teacher.columns, teacher.low)
                _write_row_gradients(
                    problem, seen(problem, some, by_teacher=True), upstream_N[rows], logits, dz
                )
                sums.teacher.add(dz, teacher.rows, rows)
            dz = logits.student_NV
            if dz_NV is not None:
                dz = dz_NV[rows.start - whole.start : rows.stop - whole.start]
            if sums.has_student:
                _write_row_gradients(
                    problem, seen(problem, some, by_teacher=False), upstream_N[rows], logits, dz
                )
        if sums is not None and sums.has_student:
            sums.student.add(dz if dz_NV is None else dz_NV, student.rows, whole)
    return value_N, state, [None] * 4 if sums is None else sums.results()


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
    problem: Problem, state: RowState, upstream_N: Tensor, needs: str, workspace_bytes: int
) -> list[Tensor | None]:
    """Return the gradients from the numbers of every row.

    Args:
        problem: the divergence.
        state: what `by_chunks` returned.
        upstream_N: the gradient of each row's value.
        needs: which gradients are wanted: x, w, b, t (the teacher's states).
        workspace_bytes: bound on the buffers, but a tile has 128 columns at least.
    """
    student, teacher, dtype = problem.student, problem.teacher, problem.dtype
    sums = Sums(problem, needs, many=False)
    N = len(student.hidden_ND)
    every, buffer = slice(0, N), Buffer(student.hidden_ND)
    step, P = _columns(problem, workspace_bytes), problem.pairs
    views = [seen(problem, state, by_teacher=by_teacher) for by_teacher in (False, True)]
    for start in range(0, P if N else 0, step):
        columns = slice(start, min(start + step, P))
        logits = _logits(problem, every, buffer, columns)
        width = columns.stop - columns.start
        if "t" in needs:
            dz = buffer.get("dz teacher", N, width, teacher.low)
            write_gradient(problem, views[1], upstream_N, logits, columns, dz)
            sums.teacher.add(dz, part_of(teacher.rows, columns.start, columns.stop), every)
        if sums.has_student:
            dz = logits.student_NV if student.low == dtype else buffer.get("dz", N, width, student.low)
            write_gradient(problem, views[0], upstream_N, logits, columns, dz)
            sums.student.add(dz, part_of(student.rows, columns.start, columns.stop), every)
    for view, gradients in ((views[0], sums.student), (views[1], sums.teacher)):
        side = view.side
        if (side is teacher and "t" not in needs) or not N:
            continue
        for start in range(P, side.columns, step):
            columns = slice(start, min(start + step, side.columns))
            rows = part_of(side.rows, columns.start, columns.stop)
            z_NV, alpha = side.logits(buffer, every, rows, columns)
            dz = z_NV if side.low == dtype else buffer.get("dz", N, columns.stop - columns.start, side.low)
            write_rest_gradient(view, upstream_N, z_NV, alpha, dz)
            gradients.add(dz, rows, every)
    return sums.results()


def _columns(problem: Problem, workspace_bytes: int) -> int:
    hidden_ND = problem.student.hidden_ND
    most_bytes = min(tiles.TILE_BYTES if hidden_ND.is_cuda else CPU_TILE_BYTES, workspace_bytes // 3)
    return tiles.width(len(hidden_ND), problem.dtype.itemsize, most_bytes, COLUMNS)


def _logits(problem: Problem, tokens: slice, buffer: Buffer, columns: slice | None = None) -> Logits:
    """Return both models' logits of some tokens; of all columns, or of some that face each other."""
    found = []
    for side in (problem.student, problem.teacher):
        rows = side.rows if columns is None else part_of(side.rows, columns.start, columns.stop)
        found.append(side.logits(buffer, tokens, rows, columns))
    (student_NV, alpha), (teacher_NV, teacher_alpha) = found
    return Logits(student_NV, teacher_NV, alpha, teacher_alpha)
