"""Match hidden states: where both models have read the same text, their latents should agree.

At the last token of each aligned chunk, with s the student's latents (projected where widths differ) and t
the teacher's, mean over channels c:

    l2    (s_c − t_c)² / n,   n = mean of t² over those chunks and all channels; `_channelwise`: of t_c²
    l1    |s_c − t_c| / n,    n = mean of |t| likewise

Mean over those chunks, then over layers. Of layers, student layer i of L faces teacher layer ⌈i M / L⌉ of M:
the same relative depth, the last with the last. n is a scale that the teacher alone sets, and of the whole
optimizer step: `measure` adds up a micro-batch, `settle` divides by the sums of all of them.

Source: Minixhofer et al. 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood
Matching", arXiv:2503.20083.

Dimensions: N chunks, D student width, E teacher width, J latents that are compared (layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenkit.kernels.head.side import check_hidden
from tokenkit.losses.base import Measured, without_gradient
from tokenkit.losses.options import Align, LatentChunks, LatentsOptions, Normalization
from tokenkit.losses.score import RowPairs, chunk_ends, need_teacher, take
from tokenkit.structs import (
    NO_CONTEXT,
    Batch,
    ChunkKind,
    Context,
    HiddenStates,
    LossTerm,
    StateKind,
    Widths,
)

STATES: dict[Align, frozenset[StateKind]] = {
    "last_hidden_state": frozenset(),
    "all_hidden_states": frozenset({"layers"}),
    "qkv": frozenset({"qkv"}),
}
"""What both models must collect."""


@dataclass(frozen=True, slots=True)
class LatentsPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: chunks."""
    rows: RowPairs
    teacher_JNE: tuple[Tensor, ...]
    """The teacher's latents, as many as the teacher has layers (three times that for qkv)."""
    norm_JE: tuple[Tensor, ...]
    """n of each of them, float32 or better: a value for each channel, or one for all."""


@dataclass(frozen=True, slots=True)
class LatentsMeasured:
    """What one micro-batch adds to the scale."""

    sum_K: Tensor
    """float64: the number of chunks, then of each of the teacher's latents Σ over chunks of t² or |t|:
    of every channel, or their mean."""
    rows: RowPairs
    teacher_JNE: tuple[Tensor, ...]


def facing_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Return the teacher's layer at the same relative depth; layers count from 0."""
    return -(-(layer + 1) * teacher_layers // student_layers) - 1


def _latents(states: HiddenStates, options: LatentsOptions, whose: str) -> list[Tensor]:
    if options.align == "last_hidden_state":
        return [states.hidden_BTD]
    latents = (
        list(states.layers_BTD)
        if options.align == "all_hidden_states"
        else [part for layer in states.qkv for part in layer]
    )
    if not latents:
        raise ValueError(
            f"{options.align}: the {whose}'s HiddenStates hold none; ask the model to collect "
            f"{sorted(STATES[options.align])}"
        )
    return latents


def _widths(widths: Widths, options: LatentsOptions) -> list[int]:
    if options.align == "last_hidden_state":
        return [widths.hidden]
    if options.align == "all_hidden_states":
        return [widths.hidden] * widths.layers
    if widths.qkv is None:
        raise ValueError(
            "qkv: the projections of this architecture are not known; align last_hidden_state or "
            "all_hidden_states instead"
        )
    return list(widths.qkv) * widths.layers


def _project(student_ND: Tensor, teacher_NE: Tensor, j: int, context: Context) -> Tensor:
    projections = context.modules
    if isinstance(projections, nn.ModuleDict) and str(j) in projections:
        linear: Any = projections[str(j)]
        return nn.functional.linear(student_ND.to(linear.weight.dtype), linear.weight, linear.bias)
    if student_ND.shape[1] != teacher_NE.shape[1]:
        raise ValueError(
            f"the student's latents are {student_ND.shape[1]} wide and the teacher's {teacher_NE.shape[1]}: "
            "set latents_do_project, or give modules() to the drop-in form"
        )
    return student_ND


def _is_channelwise(options: LatentsOptions) -> bool:
    return options.normalization.endswith("channelwise")


def _power(options: LatentsOptions) -> int:
    return 2 if options.normalization.startswith("l2") else 1


def _distance(student_NE: Tensor, teacher_NE: Tensor, norm_E: Tensor, power: int) -> Tensor:
    """Return Σ_n mean_c of the normalised differences, in float32 or better."""
    dtype = torch.promote_types(student_NE.dtype, torch.float32)
    return ((student_NE.to(dtype) - teacher_NE.to(dtype)).abs().pow(power) / norm_E).mean(1).sum()


class Latents(Measured[LatentsOptions]):
    """Hidden states at the ends of chunks."""

    @property
    def chunks(self) -> ChunkKind:
        """At the ends of these."""
        return "unconstrained" if self.options.chunks == "naive" else self.options.chunks

    @property
    def states(self) -> frozenset[StateKind]:
        """What both models must collect."""
        return STATES[self.options.align]

    def modules(self, student: Widths, teacher: Widths) -> nn.Module | None:
        """Return one projection for each latent whose widths differ, by its number among the student's.

        Raises:
            ValueError: widths differ and `project` is off.
        """
        options = self.options
        widths, teacher_widths = _widths(student, options), _widths(teacher, options)
        parts = 3 if options.align == "qkv" else 1
        found = {}
        for j, width in enumerate(widths):
            layer, part = divmod(j, parts)
            facing = facing_layer(layer, len(widths) // parts, len(teacher_widths) // parts)
            wanted = teacher_widths[facing * parts + part]
            if width != wanted:
                found[str(j)] = nn.Linear(width, wanted)
        if found and not options.project:
            raise ValueError(
                f"{options.align}: the student's latents are {widths[0]} wide and the teacher's "
                f"{teacher_widths[0]}: set latents_do_project to train a projection between them"
            )
        return nn.ModuleDict(found) if found else None

    @without_gradient
    def measure(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> LatentsMeasured:
        """Find the ends of aligned chunks, keep the teacher's latents there, and add up their sizes."""
        options = self.options
        teacher = need_teacher(teacher, "alm_latents")
        rows = chunk_ends(batch, self.chunks)
        latents = [take(x, batch.teacher, rows.teacher_N) for x in _latents(teacher, options, "teacher")]
        for teacher_NE in latents:
            check_hidden("the teacher's latents at the ends of chunks", teacher_NE)
        sizes = [torch.full((1,), len(rows.student_N), dtype=torch.float64, device=rows.student_N.device)]
        for teacher_NE in latents:
            size_NE = (
                teacher_NE.to(torch.promote_types(teacher_NE.dtype, torch.float32)).abs().pow(_power(options))
            )
            size_E = size_NE.sum(0, dtype=torch.float64)
            sizes.append(size_E if _is_channelwise(options) else size_E.mean(0, keepdim=True))
        return LatentsMeasured(torch.cat(sizes), rows, tuple(latents))

    @without_gradient
    def settle(
        self, measured: LatentsMeasured, sum_K: Tensor, batch: Batch, context: Context = NO_CONTEXT
    ) -> LatentsPrepared:
        """Form the scale of the whole step."""
        options = self.options
        lengths = [x_NE.shape[1] if _is_channelwise(options) else 1 for x_NE in measured.teacher_JNE]
        norms = []
        for teacher_NE, mean_E in zip(
            measured.teacher_JNE, (sum_K[1:] / sum_K[0].clamp_min(1)).split(lengths), strict=True
        ):
            norm_E = mean_E.to(torch.promote_types(teacher_NE.dtype, torch.float32))
            # a channel that is 0 throughout has no scale of its own: leave its differences as they are
            norms.append(norm_E.where(norm_E > 0, 1))
        count = measured.sum_K[0].long()
        return LatentsPrepared(count, measured.rows, measured.teacher_JNE, tuple(norms))

    def loss(
        self, student: HiddenStates, prepared: LatentsPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed distance, in units of the teacher's latents, and the number of chunks."""
        options = self.options
        latents = _latents(student, options, "student")
        parts = 3 if options.align == "qkv" else 1
        total = student.hidden_BTD.new_zeros((), dtype=torch.float32)
        for j, state_BTD in enumerate(latents):
            layer, part = divmod(j, parts)
            teacher_layer = facing_layer(layer, len(latents) // parts, len(prepared.teacher_JNE) // parts)
            facing = teacher_layer * parts + part
            teacher_NE = prepared.teacher_JNE[facing]
            student_ND = take(state_BTD, batch.student, prepared.rows.student_N)
            check_hidden("the student's latents at the ends of chunks", student_ND)
            student_NE = _project(student_ND, teacher_NE, j, context)
            total = total + _distance(student_NE, teacher_NE, prepared.norm_JE[facing], _power(options))
        return LossTerm(total / len(latents), prepared.count)


def latents_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    *,
    modules: nn.Module | None = None,
    align: Align = "last_hidden_state",
    normalization: Normalization = "l2_channelwise",
    chunks: LatentChunks = "naive",
    project: bool = False,
) -> LossTerm:
    """Compare latents at the ends of chunks: the drop-in form.

    Args:
        student: hidden states of the student, `layers_BTD` or `qkv` among them where they are compared.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks; the scale is taken over this batch.
        modules: trained projections, from `Latents.modules`, where widths differ.
        align: last_hidden_state; all_hidden_states: every layer's output; qkv: every layer's projections.
        normalization: what differences are divided by.
        project: whether a projection is trained where widths differ.
        chunks: at the ends of which of the batch's chunks; naive: "unconstrained".

    Returns:
        total, differentiable in the student's hidden states and the projections; count, chunks, at least 1.
    """
    options = LatentsOptions(
        align=align,
        normalization=normalization,
        chunks=chunks,
        project=project,
    )
    return Latents(options)(student, teacher, batch, modules)
