"""Approximate Likelihood Matching: make the student as sure of each chunk of text as the teacher is.

    s_k = min(0, Σ student logp) + a_k,  t_k the same for the teacher;  a_k = log P(whitespace comes next)
    loss = Σ_k w_k d(t_k, s_k) / Z       over valid chunks k; Z counts the whole optimizer step

The teacher alone decides which chunks join (`merge_by_space_prob`) and hence Z, so both are known before
the student runs. With several chunk sizes the loss is the mean over the sizes of such quotients: total
and count then hold one entry per size.

Source: Minixhofer et al. 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood
Matching", arXiv:2503.20083.

Dimensions: B documents, T student positions, S teacher positions, C chunk slots (T + S), K chunk sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenkit.kernels.alm_difference import alm_difference
from tokenkit.kernels.chunk_likelihood import Layout, Spans, chunk_likelihood, group, join
from tokenkit.kernels.kinds import Difference
from tokenkit.kernels.launch import upload
from tokenkit.kernels.linear_logprob import Subset, split_vocabulary
from tokenkit.losses.base import Loss, without_gradient
from tokenkit.losses.logprobs import LogprobRequest, ask
from tokenkit.losses.options import WORKSPACE_BYTES, AlmOptions, Denominator, Numerator
from tokenkit.losses.score import need_teacher, valid_chunks
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, Head, HiddenStates, LossTerm, Scores, Side


@dataclass(frozen=True, slots=True)
class SizedChunks:
    """The chunks of one chunk size, and what the teacher says of them."""

    student: Spans
    valid_BC: Tensor
    teacher_BC: Tensor
    """t, nats; 0 where not valid."""
    weight_BC: Tensor
    """w; 0 where not valid."""


@dataclass(frozen=True, slots=True)
class AlmPrepared:
    """What is known before the student runs."""

    count: Tensor
    """Z, int64: a scalar, or [K] where there are several sizes."""
    sizes: tuple[SizedChunks, ...]
    request: LogprobRequest
    """Of the student."""
    floor: Tensor
    """The total of a student that equals the teacher, of the shape of `count`: only `binary_ce` has one."""
    used: Tensor
    """int64 [2]: the chunks that count, and those before merge_by_space_prob and chunk sizes joined any."""


def alm(teacher: Tensor, student: Tensor, weight: Tensor, options: AlmOptions | None = None) -> Tensor:
    """Return Σ w d(t, s): the loss before its division, on plain tensors of any one shape.

    Args:
        teacher: t, log-likelihoods of chunks, nats; no gradient flows into it.
        student: s, the same shape and dtype; differentiable.
        weight: w; 0 leaves a chunk out.
        options: diff, binarization_temp and renyi_alpha are used.
    """
    options = options or AlmOptions()
    difference = alm_difference(
        teacher, student, options.diff, temperature=options.binarization_temp, renyi_alpha=options.renyi_alpha
    )
    return (weight * difference).sum()


class Alm(Loss[AlmOptions]):
    """Likelihoods of chunks, the student's against the teacher's."""

    def __init__(self, options: AlmOptions):
        super().__init__(options)
        self._subsets: dict[tuple[str, torch.device], tuple[Tensor, Subset]] = {}
        """By side and device: a tokenizer's mask is the same in every batch, and splitting it waits."""

    def teacher_request(self, batch: Batch) -> LogprobRequest:
        """Return the request for tokens of valid chunks, and whitespace behind them where a mode asks."""
        layout = valid_chunks(batch.on_host, self.options.chunks)
        return self._teacher_request(batch, layout)

    def _teacher_request(self, batch: Batch, layout: Layout) -> LogprobRequest:
        needs_mass = bool({"merge_by_space_prob", "append_space"} & set(self.options.modes))
        return LogprobRequest(
            batch.on_host.teacher,
            _in_valid(layout.teacher, layout.valid_BC),
            _at_ends(layout.teacher, layout.valid_BC) if needs_mass else None,
            self._subset("teacher", batch) if needs_mass else None,
            workspace_bytes=self.options.workspace_bytes,
        )

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> AlmPrepared:
        """Score the teacher's chunks, join them, count them, and find the student's rows.

        Raises:
            ValueError: if there is no teacher, or the batch lacks the chunks or masks that the options need.
        """
        options, teacher = self.options, need_teacher(teacher, "ALM")
        on_host = valid_chunks(batch.on_host, options.chunks)
        layout = upload(on_host, batch.student.ids_BT.device)
        num_chunks = layout.valid_BC.sum()
        merges, appends = "merge_by_space_prob" in options.modes, "append_space" in options.modes

        if merges or appends:
            _check_space(batch.teacher, options, teacher.head)
        scores = context.scores or ask(teacher, self._teacher_request(batch, on_host))
        if merges:
            assert scores.mass_BT is not None
            layout = join(
                layout,
                scores.mass_BT.gather(1, layout.teacher.last_BC.clamp_min(0)).exp() > options.space_threshold,
            )

        layouts = [group(layout, size) for size in options.chunk_sizes]
        sizes = tuple(_sized(sized, scores, appends, options.numerator) for sized in layouts)
        counts = [
            (sized.teacher_tokens_BC if options.denominator == "token_count" else sized.valid_BC).sum()
            for sized in layouts
        ]
        floors = [alm(sized.teacher_BC, sized.teacher_BC, sized.weight_BC, options) for sized in sizes]
        return AlmPrepared(
            count=counts[0] if len(counts) == 1 else torch.stack(counts),
            sizes=sizes,
            request=LogprobRequest(
                batch.on_host.student,
                _in_valid(on_host.student, on_host.valid_BC),
                # before any join: the teacher's probabilities are not known here, and what a join leaves as
                # ends are ends of these chunks
                _at_ends(on_host.student, on_host.valid_BC) if appends else None,
                self._subset("student", batch) if appends else None,
                workspace_bytes=options.workspace_bytes,
            ),
            floor=floors[0] if len(floors) == 1 else torch.stack(floors),
            used=torch.stack([sizes[0].valid_BC.sum(), num_chunks]),
        )

    def loss(
        self, student: HiddenStates, prepared: AlmPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return Σ w d(t, s) and Z (before the sum over ranks), one of each per chunk size if several."""
        options, appends = self.options, prepared.request.subset is not None
        if appends:
            _check_space(batch.student, options, student.head)
        scores = context.scores or ask(student, prepared.request)
        totals = []
        for sized in prepared.sizes:
            student_BC = _likelihood(sized.student, sized.valid_BC, scores, appends)
            teacher_BC = sized.teacher_BC.to(student_BC.dtype)
            totals.append(alm(teacher_BC, student_BC, sized.weight_BC.to(student_BC.dtype), options))
        return LossTerm(totals[0] if len(totals) == 1 else torch.stack(totals), prepared.count)

    def student_request(self, prepared: AlmPrepared) -> LogprobRequest:
        """Return the request for tokens of valid chunks, and whitespace behind them with append_space."""
        return prepared.request

    def _subset(self, whose: Literal["student", "teacher"], batch: Batch) -> Subset:
        """Return the ids whose mass is `a`, found once for a mask."""
        side = getattr(batch.on_host, whose)
        device, mask_V = batch.student.ids_BT.device, _mask(side, self.options)
        if torch.compiler.is_compiling():
            return _split(mask_V, device, self.options.mode)
        known = self._subsets.get((whose, device))
        if known is None or not torch.equal(known[0], mask_V):
            self._subsets[whose, device] = known = mask_V, _split(mask_V, device, self.options.mode)
        return known[1]


def alm_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    *,
    diff: Difference = "binary_ce",
    mode: str = "merge_by_space_prob+append_space",
    chunks: ChunkKind = "unconstrained",
    binarization_temp: float = 100.0,
    renyi_alpha: float = 0.5,
    chunk_sizes: tuple[int, ...] = (1,),
    numerator: Numerator = "chunk_count",
    denominator: Denominator = "chunk_count",
    space_threshold: float = 0.1,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare the student's likelihood of each chunk with the teacher's: the drop-in form.

    Differentiable in the student's hidden states and head; nothing flows into the teacher.

    Args:
        student: hidden states [B, T, D] and head of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks.
        diff: how two likelihoods are compared; see `tokenkit.kernels.alm_difference`.
        mode: how whitespace after a chunk is treated; see `AlmOptions`.
        chunks: which of the batch's chunks.
        binarization_temp: divides log-likelihoods.
        renyi_alpha: order of `renyi`; positive, not 1.
        chunk_sizes: for each size c, c neighbouring chunks count as one.
        numerator: weight of a chunk.
        denominator: what is counted.
        space_threshold: merge_by_space_prob joins until the teacher's probability of whitespace exceeds this.
        workspace_bytes: memory for the head beside results.

    Returns:
        total, nats; count, at least 1 so that `total / count` is 0 in a batch without a valid chunk. Where
        several `chunk_sizes` are given both hold one entry each, and the loss is `(total / count).mean()`.
    """
    options = AlmOptions(
        diff=diff,
        mode=mode,
        chunks=chunks,
        binarization_temp=binarization_temp,
        renyi_alpha=renyi_alpha,
        chunk_sizes=chunk_sizes,
        numerator=numerator,
        denominator=denominator,
        space_threshold=space_threshold,
        workspace_bytes=workspace_bytes,
    )
    return Alm(options)(student, teacher, batch)


def _mask(side: Side, options: AlmOptions) -> Tensor:
    """Return bool [V], the ids whose mass is `a`: those that begin with whitespace, or EOS alone."""
    if "eos_as_space" in options.modes:
        if side.eos_id is None:
            raise ValueError("mode eos_as_space needs Side.eos_id: this tokenizer has no EOS token")
        return torch.arange(side.eos_id + 1) == side.eos_id
    if side.space_V is None:
        raise ValueError(f"mode {options.mode} needs Side.space_V: build the batch with a space mask")
    return side.space_V


def _split(mask_V: Tensor, device: torch.device, mode: str) -> Subset:
    try:
        return split_vocabulary(mask_V.to(device))
    except ValueError as error:
        if "holds no id" not in str(error):
            raise
        raise ValueError(
            f"alm_mode {mode} asks for the mass of whitespace, and Side.space_V names no token: this "
            "tokenizer has none that begins with it; widen space_mask_mode, or use eos_as_space or none"
        ) from error


def _check_space(side: Side, options: AlmOptions, head: Head) -> None:
    """Raise ValueError where the mask of whitespace leaves real tokens of this head out."""
    if side.space_V is None or "eos_as_space" in options.modes:
        return
    vocab_size = head.vocab_size or head.weight_VD.shape[0]
    if len(side.space_V) < vocab_size:
        raise ValueError(
            f"Side.space_V covers {len(side.space_V)} ids but the head has {vocab_size}: is it the mask of "
            "another tokenizer? Where the other rows are padding, say so: Head(..., vocab_size=...)"
        )


def _sized(layout: Layout, scores: Scores, appends: bool, numerator: Numerator) -> SizedChunks:
    teacher_BC = _likelihood(layout.teacher, layout.valid_BC, scores, appends)
    tokens_BC = layout.teacher_tokens_BC.to(teacher_BC.dtype)
    weight_BC = layout.valid_BC.to(teacher_BC.dtype)
    if numerator == "token_count":
        weight_BC = tokens_BC
    elif numerator == "log1p_token_count":
        weight_BC = tokens_BC.log1p()
    return SizedChunks(layout.student, layout.valid_BC, teacher_BC, weight_BC)


def _likelihood(spans: Spans, valid_BC: Tensor, scores: Scores, appends: bool) -> Tensor:
    append_BC = None
    if appends:
        assert scores.mass_BT is not None
        append_BC = scores.mass_BT.gather(1, spans.last_BC.clamp_min(0)).where(valid_BC, 0)
    return chunk_likelihood(scores.logp_BT, spans, append_BC).where(valid_BC, 0)


def _in_valid(spans: Spans, valid_BC: Tensor) -> Tensor:
    """Return [B, L]: tokens of valid chunks."""
    return torch.nn.functional.pad(valid_BC, (0, 1)).gather(1, spans.slot_BL)


def _at_ends(spans: Spans, valid_BC: Tensor) -> Tensor:
    """Return [B, L]: last tokens of valid chunks."""
    B, L = spans.slot_BL.shape
    last_BC = spans.last_BC.where(valid_BC, L)
    at_BL = torch.zeros((B, L + 1), dtype=torch.bool, device=valid_BC.device)
    return at_BL.scatter_(1, last_BC, True)[:, :-1]
