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

from tokenkit.kernels import sorted_tile as tile
from tokenkit.kernels.launch import low_dtype
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.kernels.row_chunks import (
    add_hidden_gradient,
    add_weight_gradient,
    chunks,
    write_products,
    write_weight_gradient,
)
from tokenkit.kernels.sorted_exact import compare_sorted, sort_memory
from tokenkit.kernels.vocabulary_parallel import check_cover, local_rows, reduce_max, reduce_sum
from tokenkit.structs import Head

CPU_CHUNK_BYTES = 64 * 2**20  # a larger GEMM is no faster there
TILE_BYTES = 128 * 2**20  # of z, in the backward of mode `tables`
CPU_TILE_BYTES = 8 * 2**20
COLUMNS = (128, 8192)  # fewest: smaller GEMMs waste time; most: enough for a full contraction to be large
HISTOGRAM_BYTES = 3 * 8 * tile.BINS  # of a row: the student's on this rank and on all, and the difference


class Options(NamedTuple):
    """What an operation is told besides its tensors; numbers and words are all that it can take."""

    mode: str
    """values, formed or tables."""
    exact: bool
    needs: str
    """Which gradients: x hidden states, w weight, b bias."""
    temperature: float
    workspace_bytes: int


class Side:
    """One model: its states, its head, and the logits of a few rows."""

    def __init__(self, hidden_ND: Tensor, head: Head, temperature: float) -> None:
        self.hidden_ND, self.head = hidden_ND, head
        start, end = local_rows(head)
        self.V = end - start
        self.dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        self.alpha = head.scale / temperature
        self.cap = None if head.softcap is None else head.softcap / temperature
        self.buffer: Tensor | None = None

    def row_bytes(self) -> int:
        """Of the logits of one row; the same on every rank."""
        if self.head.shard is None:
            return self.V * self.dtype.itemsize
        assert self.head.vocab_size is not None
        return -(-self.head.vocab_size // self.head.shard.group.size()) * self.dtype.itemsize

    def logits(self, rows: slice, columns: slice | None = None) -> Tensor:
        """Return [rows, columns of what is here], contiguous, in a buffer that the next call overwrites."""
        columns = slice(0, self.V) if columns is None else columns
        hidden_ND = self.hidden_ND[rows]
        shape = len(hidden_ND), columns.stop - columns.start
        if self.buffer is None:
            self.buffer = hidden_ND.new_empty(shape[0] * shape[1], dtype=self.dtype)
        z_NV = self.buffer[: shape[0] * shape[1]].view(shape)
        write_products(hidden_ND, self.head.weight_VD, columns, z_NV)
        if self.head.bias_V is not None:
            z_NV.add_(self.head.bias_V[columns].to(self.dtype))
        if self.alpha != 1:
            z_NV.mul_(self.alpha)
        return z_NV if self.cap is None else z_NV.div_(self.cap).tanh_().mul_(self.cap)

    def softmax(self, z_NV: Tensor, name: str, rows: slice) -> tile.Softmax:
        """Return what makes probabilities of these rows, over all ranks."""
        here_N, sum_N = tile.row_statistics(z_NV)
        max_N = reduce_max(here_N.clone(), self.head)
        sum_N = reduce_sum(sum_N * torch.exp(here_N - max_N), self.head)
        finite_N = torch.isfinite(sum_N)
        if self.cap is not None:  # which hides infinities
            finite_N &= torch.isfinite(self.hidden_ND[rows]).all(1)
        _check_finite(name, finite_N, rows)
        return tile.Softmax(max_N, sum_N.reciprocal_())


class Gradients:
    """Sums of the gradients that are needed, in float32 or float64, and the chunk's dz."""

    def __init__(self, student: Side, needs: str) -> None:
        self.student, self.needs = student, needs
        head, dtype = student.head, student.dtype
        self.sums: dict[str, Tensor] = {}
        for name, tensor in (("x", student.hidden_ND), ("w", head.weight_VD), ("b", head.bias_V)):
            if name in needs and tensor is not None:
                self.sums[name] = torch.zeros_like(tensor, dtype=dtype)
        self.low = low_dtype(student.hidden_ND, dtype)
        self.buffer: Tensor | None = None

    def extra_bytes(self) -> int:
        """Return what the sum of dW takes beside the dW that is returned."""
        wider = "w" in self.sums and self.student.head.weight_VD.dtype != self.student.dtype
        return self.sums["w"].nbytes if wider else 0

    def room(self, z_NV: Tensor) -> Tensor:
        """Return where dz is written: over z, or in the dtype that a GPU multiplies."""
        if z_NV.dtype == self.low:
            return z_NV
        if self.buffer is None:
            self.buffer = torch.empty(z_NV.numel(), dtype=self.low, device=z_NV.device)
        return self.buffer[: z_NV.numel()].view(z_NV.shape)

    def add(self, dz_NV: Tensor, rows: slice) -> None:
        """Add what these rows of dz give."""
        if not dz_NV.shape[1]:
            return
        columns = slice(0, dz_NV.shape[1])
        weight_VD, hidden_ND = self.student.head.weight_VD, self.student.hidden_ND
        if "x" in self.sums:
            add_hidden_gradient(dz_NV, weight_VD, columns, self.sums["x"][rows])
        if "w" in self.sums:
            add_weight_gradient(dz_NV, hidden_ND[rows], columns, self.sums["w"])
        if "b" in self.sums:
            self.sums["b"][columns] += dz_NV.sum(0, dtype=self.student.dtype)

    def results(self) -> list[Tensor]:
        """Return the sums in the order of `needs`, that of the hidden states over all ranks."""
        if "x" in self.sums:
            self.sums["x"] = reduce_sum(self.sums["x"], self.student.head)
        return [self.sums[name] for name in self.needs]


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
    gradients = Gradients(student, options.needs if forms else "")
    factor_N = torch.ones_like(value_N) if row_weight_N is None else row_weight_N.to(student.dtype)
    workspace_bytes = _workspace(student, options.workspace_bytes - gradients.extra_bytes())
    row_bytes = _row_bytes(student, teacher, gradients)
    if options.exact:
        row_bytes, fixed_bytes = _sorting_bytes(student, teacher, forms)
        workspace_bytes -= fixed_bytes
    for rows in chunks(N, row_bytes, workspace_bytes):
        z_NV, z_NW = student.logits(rows), teacher.logits(rows)
        softmax = student.softmax(z_NV, "student_ND", rows)
        teacher_softmax = teacher.softmax(z_NW, "teacher_NE", rows)
        factor = factor_N[rows] * student.alpha
        if options.exact:
            pull_NV = None if not forms else z_NV if student.cap is None else torch.empty_like(z_NV)
            both = (softmax, teacher_softmax)
            compare_sorted((z_NV, z_NW), both, value_N[rows], pull_NV, centred=True)
            if pull_NV is not None:
                pull_NV.mul_(factor[:, None])
                if student.cap is not None:
                    pull_NV.mul_(z_NV.div_(student.cap).square_().neg_().add_(1))
                gradients.add(pull_NV.to(gradients.low), rows)
            continue
        foot_N = tile.foot(torch.maximum(softmax.inverse_N, teacher_softmax.inverse_N))
        own = tile.histogram(z_NV, softmax, foot_N)
        everyones = own if student.head.shard is None else reduce_sum(own.clone(), student.head)
        difference = reduce_sum(tile.histogram(z_NW, teacher_softmax, foot_N), teacher.head)
        difference.neg_().add_(everyones)
        value_N[rows], sign_NB, mean_N = tile.merge(own, difference, foot_N, student.dtype)
        row = tile.RowFactors(*softmax, foot_N, reduce_sum(mean_N, student.head), factor)
        if forms:
            dz_NV = gradients.room(z_NV)
            tile.dlogits(z_NV, row, sign_NB, student.cap, dz_NV)
            gradients.add(dz_NV, rows)
        elif tables:
            for whole, part in zip(kept, (*row[:4], sign_NB), strict=True):
                whole[rows] = part
    value = value_N if row_weight_N is None else (factor_N * value_N).sum()
    return [value, *gradients.results()] if forms else [value, *kept] if tables else [value]


def run_bounds(student: Side, teacher: Side, workspace_bytes: int) -> Tensor:
    """Return how much of each row's distance the bins may hide."""
    bound_N = torch.empty(len(student.hidden_ND), dtype=student.dtype, device=student.hidden_ND.device)
    row_bytes = _row_bytes(student, teacher, Gradients(student, ""))
    for rows in chunks(len(bound_N), row_bytes, _workspace(student, workspace_bytes)):
        z_NV, z_NW = student.logits(rows), teacher.logits(rows)
        softmax = student.softmax(z_NV, "student_ND", rows)
        teacher_softmax = teacher.softmax(z_NW, "teacher_NE", rows)
        foot_N = tile.foot(torch.maximum(softmax.inverse_N, teacher_softmax.inverse_N))
        own = tile.histogram(z_NV, softmax, foot_N)
        theirs = tile.histogram(z_NW, teacher_softmax, foot_N)
        bound_N[rows] = tile.bound(own, theirs, foot_N, student.dtype)
    return bound_N


def _workspace(student: Side, workspace_bytes: int) -> int:
    return workspace_bytes if student.hidden_ND.is_cuda else min(workspace_bytes, CPU_CHUNK_BYTES)


def _sorting_bytes(student: Side, teacher: Side, forms: bool) -> tuple[int, int]:
    """Return what a row of a chunk takes that is sorted, and what all take together."""
    row_bytes, fixed_bytes = sort_memory(student.hidden_ND.device, student.V, teacher.V)
    slope_bytes = student.row_bytes() if forms and student.cap is not None else 0
    return student.row_bytes() + teacher.row_bytes() + slope_bytes + row_bytes, fixed_bytes


def _row_bytes(student: Side, teacher: Side, gradients: Gradients) -> int:
    """Return what one row of a chunk takes that is counted in bins."""
    z_bytes, both_bytes = student.row_bytes(), student.row_bytes() + teacher.row_bytes()
    low_bytes = 0 if gradients.low == student.dtype else z_bytes * gradients.low.itemsize // 4
    return both_bytes + HISTOGRAM_BYTES + low_bytes


def run_backward(student: Side, factor_N: Tensor, tables: list[Tensor], options: Options) -> list[Tensor]:
    """Return the gradients of mode `tables`: the vocabulary in tiles, every dW one product over all rows."""
    max_N, inverse_N, foot_N, mean_N, sign_NB = tables
    factor_N = factor_N.to(student.dtype) * student.alpha
    row = tile.RowFactors(max_N, inverse_N, foot_N, mean_N, factor_N)
    gradients = Gradients(student, options.needs.replace("w", "").replace("b", ""))
    head, N = student.head, len(student.hidden_ND)
    dweight_VD = torch.zeros_like(head.weight_VD) if "w" in options.needs else None
    dbias_V = None
    if "b" in options.needs and head.bias_V is not None:
        dbias_V = torch.zeros_like(head.bias_V)
    tile_bytes = TILE_BYTES if student.hidden_ND.is_cuda else CPU_TILE_BYTES
    columns = min(options.workspace_bytes, tile_bytes) // (max(N, 1) * student.dtype.itemsize)
    fewest, most = COLUMNS
    columns = min(max(columns // fewest * fewest, fewest), most)
    for start in range(0, student.V if N else 0, columns):
        part = slice(start, min(start + columns, student.V))
        z_NV = student.logits(slice(0, N), part)
        dz_NV = gradients.room(z_NV)
        tile.dlogits(z_NV, row, sign_NB, student.cap, dz_NV)
        if "x" in gradients.sums:
            add_hidden_gradient(dz_NV, head.weight_VD, part, gradients.sums["x"])
        if dweight_VD is not None:
            write_weight_gradient(dz_NV, student.hidden_ND, part, dweight_VD)
        if dbias_V is not None:
            dbias_V[part] = dz_NV.sum(0, dtype=student.dtype).to(dbias_V.dtype)
    results = {"w": dweight_VD, "b": dbias_V}
    return [*gradients.results(), *(x for x in results.values() if x is not None)]


def _check_finite(name: str, finite_N: Tensor, rows: slice) -> None:
    words = f"{name} and its head must give finite logits"
    if finite_N.is_cuda:
        torch._assert_async(finite_N.all(), words)
    elif not bool(finite_N.all()):
        row = rows.start + int((~finite_N).nonzero()[0])
        raise NotFiniteError(f"{words}: row {row} holds NaN or inf; look at what the model returned there")
