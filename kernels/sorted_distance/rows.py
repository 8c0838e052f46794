"""The loops of `sorted_distance`: a few rows of both models' logits at a time, or tiles of the vocabulary.

    run             value_N, and the gradients or the tables that the backward needs
    run_backward    the gradients of mode `tables`
    run_bounds      how far the values may be off

Dimensions: N rows, V student and W teacher vocabulary (what is here), D hidden size, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.head import logits, tiles
from tokenkit.kernels.head.products import Gradients, part_of
from tokenkit.kernels.head.sharded import check_cover, reduce_max, reduce_sum
from tokenkit.kernels.head.side import Side
from tokenkit.kernels.head.tiles import Buffer, chunks, grouped
from tokenkit.kernels.sorted_distance import tile
from tokenkit.kernels.sorted_distance.exact import compare_sorted, sort_memory

CPU_CHUNK_BYTES = 64 * 2**20  # a larger GEMM is no faster there
CPU_TILE_BYTES = 8 * 2**20
COLUMNS = tiles.COLUMNS
HISTOGRAM_BYTES = 3 * 8 * tile.BINS  # of a row: the student's on this rank and on all, and the difference


class Options(NamedTuple):
    """What an operation is told besides its tensors."""

    mode: str
    """values, formed or tables."""
    exact: bool
    needs: str
    """Which gradients: x hidden states, w weight, b bias."""
    workspace_bytes: int


def softmax_of(side: Side, z_NV: Tensor, alpha: float, rows: slice) -> tile.Softmax:
    """Return what makes probabilities of some rows of logits (up to alpha), over all ranks."""
    here_N, sum_N = logits.row_sums(z_NV, alpha)
    max_N = reduce_max(here_N.clone(), side.head)
    sum_N = reduce_sum(sum_N * torch.exp(here_N - max_N), side.head)
    side.check_finite(sum_N, rows.start)
    return tile.Softmax(max_N, sum_N.reciprocal_())


def whole_logits(side: Side, buffer: Buffer, rows: slice) -> tuple[Tensor, tile.Softmax]:
    """Return logits of some rows, nothing left to their reader, and what makes probabilities of them."""
    z_NV, alpha = side.logits(buffer, rows)
    if alpha != 1:
        z_NV.mul_(alpha)
    return z_NV, softmax_of(side, z_NV, 1.0, rows)


def run(student: Side, teacher: Side, row_weight_N: Tensor | None, options: Options) -> list[Tensor]:
    """Return value_N (or the weighted sum), then what the mode keeps."""
    N, device = len(student.hidden_ND), student.hidden_ND.device
    check_cover(student.head, device)
    check_cover(teacher.head, device)
    forms, tables = options.mode == "formed", options.mode == "tables"
    value_N = torch.empty(N, dtype=student.dtype, device=device)
    kept = []
    if tables:
        dtypes = (student.dtype, student.dtype, torch.float32, student.dtype)
        kept = [torch.empty(N, dtype=dtype, device=device) for dtype in dtypes]
        kept.append(torch.empty((N, tile.BINS), dtype=torch.int8, device=device))
    sides, gradients = (student, teacher), Gradients(student, options.needs if forms else "")
    buffer = Buffer(student.hidden_ND)
    factor_N = torch.ones_like(value_N) if row_weight_N is None else row_weight_N.to(student.dtype)
    workspace_bytes = _workspace(student, options.workspace_bytes - gradients.extra_bytes())
    row_bytes = student.row_bytes() + teacher.row_bytes() + HISTOGRAM_BYTES
    if options.exact:
        row_bytes, fixed_bytes = _sorting_bytes(student, teacher, forms)
        workspace_bytes -= fixed_bytes
    waits = forms and student.low != student.dtype
    low_bytes = student.row_bytes() // student.dtype.itemsize * student.low.itemsize if waits else 0
    for group in grouped(N, row_bytes, low_bytes, workspace_bytes):
        whole = slice(group[0].start, group[-1].stop)
        dz_NV = buffer.get("dz", whole.stop - whole.start, student.columns, student.low) if waits else None
        for rows in group:
            here_NV = None if dz_NV is None else dz_NV[rows.start - whole.start : rows.stop - whole.start]
            factor = factor_N[rows] * student.alpha
            if options.exact:
                here_NV = _sorted_rows(sides, buffer, value_N, rows, (factor, here_NV) if forms else None)
                continue
            z_NV, alpha, row, sign_NB, value_N[rows] = _counted_rows(sides, buffer, rows, factor)
            if forms:
                here_NV = z_NV if here_NV is None else here_NV
                tile.dlogits(z_NV, row, sign_NB, student.cap, here_NV, alpha)
            for kept_N, part in zip(kept, (*row[:4], sign_NB), strict=False):
                kept_N[rows] = part
        if forms and here_NV is not None:
            gradients.add(here_NV if dz_NV is None else dz_NV, student.rows, whole)
    value = value_N if row_weight_N is None else (factor_N * value_N).sum()
    return [value, *_found(gradients)] if forms else [value, *kept] if tables else [value]


def _counted_rows(
    sides: tuple[Side, Side], buffer: Buffer, rows: slice, factor_N: Tensor
) -> tuple[Tensor, float, tile.RowFactors, Tensor, Tensor]:
    """Return of some rows the student's logits, what is left to multiply them with, what dz needs, values."""
    (z_NV, alpha), (z_NW, teacher_alpha) = (side.logits(buffer, rows) for side in sides)
    head, teacher_head = sides[0].head, sides[1].head
    softmax = softmax_of(sides[0], z_NV, alpha, rows)
    teacher_softmax = softmax_of(sides[1], z_NW, teacher_alpha, rows)
    foot_N = tile.foot(torch.maximum(softmax.inverse_N, teacher_softmax.inverse_N))
    own = tile.histogram(z_NV, softmax, foot_N, alpha)
    everyones = own if head.shard is None else reduce_sum(own.clone(), head)
    difference = reduce_sum(tile.histogram(z_NW, teacher_softmax, foot_N, teacher_alpha), teacher_head)
    difference.neg_().add_(everyones)
    value_N, sign_NB, mean_N = tile.merge(own, difference, foot_N, z_NV.dtype)
    row = tile.RowFactors(*softmax, foot_N, reduce_sum(mean_N, head), factor_N)
    return z_NV, alpha, row, sign_NB, value_N


def _sorted_rows(
    sides: tuple[Side, Side],
    buffer: Buffer,
    value_N: Tensor,
    rows: slice,
    gradient: tuple[Tensor, Tensor | None] | None,
) -> Tensor | None:
    """Write the values of some rows by a sort; with a factor of each return dz, in the tensor beside it."""
    (z_NV, softmax), (z_NW, teacher_softmax) = (whole_logits(side, buffer, rows) for side in sides)
    cap = sides[0].cap
    pull_NV = None if gradient is None else z_NV if cap is None else torch.empty_like(z_NV)
    compare_sorted((z_NV, z_NW), (softmax, teacher_softmax), value_N[rows], pull_NV, centred=True)
    if pull_NV is None or gradient is None:
        return None
    pull_NV.mul_(gradient[0][:, None])
    if cap is not None:
        pull_NV.mul_(logits.slope(z_NV, cap, out=z_NV))
    return pull_NV if gradient[1] is None else gradient[1].copy_(pull_NV)


def _found(gradients: Gradients) -> list[Tensor]:
    return [x for x in gradients.results() if x is not None]


def run_bounds(student: Side, teacher: Side, workspace_bytes: int) -> Tensor:
    """Return how much of each row's distance the bins may hide."""
    bound_N = torch.empty(len(student.hidden_ND), dtype=student.dtype, device=student.hidden_ND.device)
    row_bytes = student.row_bytes() + teacher.row_bytes() + HISTOGRAM_BYTES
    buffer = Buffer(student.hidden_ND)
    for rows in chunks(len(bound_N), row_bytes, _workspace(student, workspace_bytes)):
        z_NV, softmax = whole_logits(student, buffer, rows)
        z_NW, teacher_softmax = whole_logits(teacher, buffer, rows)
        foot_N = tile.foot(torch.maximum(softmax.inverse_N, teacher_softmax.inverse_N))
        own = tile.histogram(z_NV, softmax, foot_N)
        theirs = tile.histogram(z_NW, teacher_softmax, foot_N)
        bound_N[rows] = tile.bound(own, theirs, foot_N, student.dtype)
    return bound_N


def _workspace(student: Side, workspace_bytes: int) -> int:
    return workspace_bytes if student.hidden_ND.is_cuda else min(workspace_bytes, CPU_CHUNK_BYTES)


def _sorting_bytes(student: Side, teacher: Side, forms: bool) -> tuple[int, int]:
    """Return what a row of a chunk takes that is sorted, and what all take together."""
    row_bytes, fixed_bytes = sort_memory(student.hidden_ND.device, student.columns, teacher.columns)
    slope_bytes = student.row_bytes() if forms and student.cap is not None else 0
    return student.row_bytes() + teacher.row_bytes() + slope_bytes + row_bytes, fixed_bytes


def run_backward(student: Side, factor_N: Tensor, tables: list[Tensor], options: Options) -> list[Tensor]:
    """Return the gradients of mode `tables`: the vocabulary in tiles, every dW one product over all rows."""
    max_N, inverse_N, foot_N, mean_N, sign_NB = tables
    row = tile.RowFactors(max_N, inverse_N, foot_N, mean_N, factor_N.to(student.dtype) * student.alpha)
    gradients, buffer = Gradients(student, options.needs, adds=False), Buffer(student.hidden_ND)
    N = len(student.hidden_ND)
    most_bytes = min(
        tiles.TILE_BYTES if student.hidden_ND.is_cuda else CPU_TILE_BYTES, options.workspace_bytes
    )
    step = tiles.width(N, student.dtype.itemsize, most_bytes, COLUMNS)
    for start in range(0, student.columns if N else 0, step):
        part = slice(start, min(start + step, student.columns))
        rows = part_of(student.rows, part.start, part.stop)
        z_NV, alpha = student.logits(buffer, slice(0, N), rows, part)
        dz_NV = z_NV if z_NV.dtype == student.low else buffer.get("dz", N, z_NV.shape[1], student.low)
        tile.dlogits(z_NV, row, sign_NB, student.cap, dz_NV, alpha)
        gradients.add(dz_NV, rows, slice(0, N))
    tensors = student.hidden_ND, student.head.weight_VD, student.head.bias_V
    found = zip(gradients.results(), tensors, strict=True)
    return [x.to(like.dtype) for x, like in found if x is not None and like is not None]
