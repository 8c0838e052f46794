"""GOLD as TRL publishes it: universal logit distillation of merged tokens, its options by their names there.

In each answer, groups g of student and teacher tokens face each other (`answers.py`): with `use_extended_uld`
those that end at the same byte, without it token i and token i. With P = c p the student's distribution at
the row that speaks for a group, times the probabilities of the group's other tokens, Q = d q the teacher's,

    value(g)   Σ_r |P_(r) − Q_(r)|                                    in descending order
    hybrid     w_m Σ_k F_β(P_s(k), Q_t(k)) + w_u Σ_r |P_(r) − Q_(r)|  pairs k of ids; by rank only the others
    loss       uld_distillation_weight · mean over documents of (mean over their groups of value)
               + uld_crossentropy_weight · mean over tokens of −log p(token)

F_β: `kernels/hybrid_distance.py`, the generalized Jensen-Shannon divergence of numbers that do not add up to
1, at 1e-8 or above. A document whose answers have no group counts, with value 0. w_m, where both weights are
None, is the pairs' share of the teacher's vocabulary, and w_u = 1 − w_m. By default ("observed") all rows are
read one position late, as they are there.

Source: Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model Family", and the loss of TRL's
GOLDTrainer (1.16); ULD: Boizard et al., arXiv:2402.12030; β: Agarwal et al., arXiv:2306.13649, eq. 1.

Dimensions: N groups, M tokens that multiply, P pairs of ids, B documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.hybrid_distance import FLOOR, Measure, Pairs, hybrid_distance, split_columns
from tokenkit.kernels.launch import upload
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.losses.answers import (
    Groups,
    Scalars,
    answer_tokens,
    extended_groups,
    positional_groups,
    without_last,
)
from tokenkit.losses.base import Loss, Pair, without_gradient
from tokenkit.losses.logprobs import LogprobRequest, ask
from tokenkit.losses.options import WORKSPACE_BYTES, GoldOptions, Strategy
from tokenkit.losses.score import check_pairs, in_dtype, need_head, need_teacher, scored_tokens, take
from tokenkit.structs import NO_CONTEXT, Batch, ChunkKind, Context, Head, HiddenStates, LossTerm, Side


@dataclass(frozen=True, slots=True)
class GoldPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64: documents with an answer; with a cross entropy [2], its tokens too."""
    groups: Groups
    weight_N: Tensor
    """1 / groups of the same document."""
    teacher_NE: Tensor
    teacher_log_scale_N: Tensor
    """log d."""
    pairs: Pairs | None
    tokens: LogprobRequest | None
    """Of the cross entropy."""


def need_whole(name: str, student_head: Head | None, teacher_head: Head) -> None:
    """Raise ValueError where a head is divided over processes."""
    for side, head in (("student", student_head), ("teacher", teacher_head)):
        if head is not None and head.shard is not None:
            raise ValueError(
                f"the {side}'s head is divided over processes: {name} sorts whole rows, and needs it whole"
            )


def log_scales(
    states: HiddenStates, side: Side, scalars: Scalars, groups: int, temperature: float, workspace_bytes: int
) -> Tensor:
    """Return log c of each group: Σ log max(p, 1e-8) of the tokens that multiply it; differentiable."""
    hidden_MD = take(states.hidden_BTD, side, scalars.row_M)
    said = linear_logprob(
        hidden_MD,
        in_dtype(states.head, hidden_MD.dtype),
        scalars.target_M,
        temperature=temperature,
        workspace_bytes=workspace_bytes,
    )
    logp_M = said.logp_N.clamp_min(math.log(FLOOR))
    return logp_M.new_zeros(groups).index_add(0, scalars.group_M, logp_M)


class Gold(Loss[GoldOptions]):
    """TRL's GOLD.

    Args:
        options: the published ones.
        student_index: int64 [P], student ids that are compared one by one, none twice; with
            `uld_use_hybrid_loss`.
        teacher_index: int64 [P], their partners; `tokenkit.pairing.matching.published_pairs` finds them.
    """

    reads_teacher_head = True

    def __init__(
        self, options: GoldOptions, student_index: Tensor | None = None, teacher_index: Tensor | None = None
    ):
        super().__init__(options)
        if options.uld_use_hybrid_loss:
            if student_index is None or teacher_index is None:
                raise ValueError(
                    "uld_use_hybrid_loss compares pairs of ids: give student_index and teacher_index"
                )
            check_pairs(student_index, teacher_index)
        self.student_index, self.teacher_index = student_index, teacher_index
        self._pairs: dict[tuple[Any, ...], Pairs] = {}
        """By vocabulary sizes and device: finding the columns waits for the device, once per run."""

    @classmethod
    def resources(cls, options: GoldOptions, pair: Pair) -> dict[str, Any]:
        """Return the pairs of ids, where they are compared."""
        return pair.published() if options.uld_use_hybrid_loss else {}

    @without_gradient
    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> GoldPrepared:
        """Find the groups of the answers, and what the teacher says of their tokens."""
        options = self.options
        teacher = need_teacher(teacher, "baseline_gold")
        need_whole("baseline_gold", context.student_head, teacher.head)
        on_host, device = batch.on_host, batch.student.ids_BT.device
        student_BT, teacher_BS = answer_tokens(on_host, options.chunks)
        has_answer_B = scored_tokens(on_host.student).any(1) | scored_tokens(on_host.teacher).any(1)
        if options.uld_skip_student_eos:
            student_BT = without_last(student_BT)
        if options.uld_skip_teacher_eos:
            teacher_BS = without_last(teacher_BS)
        strategy = options.uld_token_merge_strategy
        if options.use_extended_uld:
            groups = extended_groups(on_host, options.chunks, student_BT, teacher_BS, strategy)
        else:
            groups = positional_groups(student_BT, teacher_BS, strategy)
        groups_B = groups.document_N.bincount(minlength=len(student_BT))
        weight_N = upload(groups_B.double().reciprocal()[groups.document_N], device)
        groups = upload(groups, device)
        teacher_NE = take(teacher.hidden_BTD, batch.teacher, groups.rows.teacher_N)
        temperature, workspace_bytes = options.uld_teacher_temperature, options.workspace_bytes
        log_scale_N = log_scales(
            teacher, batch.teacher, groups.teacher, len(weight_N), temperature, workspace_bytes
        )
        pairs = None
        if options.uld_use_hybrid_loss:
            if context.student_head is None:
                raise ValueError("baseline_gold must know both vocabularies: give both heads in its Context")
            pairs = self._columns(context.student_head, teacher.head)
        count, tokens = has_answer_B.sum(), None
        if options.uld_crossentropy_weight:
            tokens = LogprobRequest.of_scored(on_host.student, workspace_bytes)
            count = torch.stack([count, tokens.token_BT.sum()])
        return GoldPrepared(upload(count, device), groups, weight_N, teacher_NE, log_scale_N, pairs, tokens)

    def student_request(self, prepared: GoldPrepared) -> LogprobRequest | None:
        """Return the request of the cross entropy; the tokens that multiply a group are asked apart."""
        return prepared.tokens

    def _columns(self, student_head: Head, teacher_head: Head) -> Pairs:
        heads = student_head, teacher_head
        key = (*map(vocab_size, heads), student_head.weight_VD.device)
        if key not in self._pairs:
            assert self.student_index is not None
            assert self.teacher_index is not None
            self._pairs[key] = split_columns(*heads, self.student_index, self.teacher_index)
        return self._pairs[key]

    def loss(
        self, student: HiddenStates, prepared: GoldPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed loss and the number of documents; with a cross entropy two sums, each times 2."""
        options = self.options
        groups, pairs = prepared.groups, prepared.pairs
        student_ND = take(student.hidden_BTD, batch.student, groups.rows.student_N)
        temperature, workspace_bytes = options.uld_student_temperature, options.workspace_bytes
        log_scale_N = log_scales(
            student, batch.student, groups.student, len(student_ND), temperature, workspace_bytes
        )
        teacher_head = need_head(context.teacher_head, prepared.teacher_NE.dtype)
        weights = (0.0, 1.0)
        if pairs is not None:
            share = len(pairs.teacher_P) / vocab_size(teacher_head)
            weights = (share, 1 - share)
            if (
                options.uld_hybrid_matched_weight is not None
                and options.uld_hybrid_unmatched_weight is not None
            ):
                weights = (options.uld_hybrid_matched_weight, options.uld_hybrid_unmatched_weight)
        compared = hybrid_distance(
            (student_ND, in_dtype(student.head, student_ND.dtype), log_scale_N),
            (prepared.teacher_NE, teacher_head, prepared.teacher_log_scale_N),
            prepared.weight_N.to(log_scale_N.dtype),
            pairs,
            Measure(
                *weights,
                options.beta,
                options.exact is not False,
                temperature,
                options.uld_teacher_temperature,
                workspace_bytes,
            ),
        )
        total = options.uld_distillation_weight * compared
        if prepared.tokens is not None:
            said = context.scores or ask(student, prepared.tokens)
            entropy = -options.uld_crossentropy_weight * said.logp_BT.sum()
            total = 2 * torch.stack([total, entropy.to(total.dtype)])
        return LossTerm(total, prepared.count)


def gold_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    student_index: Tensor | None = None,
    teacher_index: Tensor | None = None,
    *,
    use_extended_uld: bool = True,
    uld_token_merge_strategy: Strategy = "observed",
    uld_use_hybrid_loss: bool = False,
    uld_hybrid_matched_weight: float | None = None,
    uld_hybrid_unmatched_weight: float | None = None,
    uld_crossentropy_weight: float = 0.0,
    uld_distillation_weight: float = 1.0,
    uld_student_temperature: float = 1.0,
    uld_teacher_temperature: float = 1.0,
    uld_skip_student_eos: bool = True,
    uld_skip_teacher_eos: bool = True,
    beta: float = 0.5,
    exact: bool | None = None,
    chunks: ChunkKind = "unconstrained",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare the answers of both models as TRL's GOLD does: the drop-in form.

    Args:
        student: hidden states and head of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations and their chunks; `trained_BT` marks the answers.
        student_index: int64 [P], student ids of the matched tokens, with `uld_use_hybrid_loss`.
        teacher_index: int64 [P], their partners.
        use_extended_uld: groups of tokens that end at the same byte; else token i faces token i.
        uld_token_merge_strategy: which row speaks for a group: `answers.py`.
        uld_use_hybrid_loss: compare ids of both vocabularies one by one, and only the others by rank.
        uld_hybrid_matched_weight: w_m; both weights or neither.
        uld_hybrid_unmatched_weight: w_u.
        uld_crossentropy_weight: of the student's cross entropy with its answers.
        uld_distillation_weight: of what is compared with the teacher.
        uld_student_temperature: divides the student's logits, but in the cross entropy.
        uld_teacher_temperature: divides the teacher's logits.
        uld_skip_student_eos: leave the last token of each of the student's answers out.
        uld_skip_teacher_eos: the same of the teacher's.
        beta: in [0, 1]: 0 the forward, 1 the reverse divergence.
        exact: False adds up histograms, on a GPU faster; else sort.
        chunks: which of the batch's chunks.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total, differentiable in the student's hidden states and head, and count, at least 1: the loss is
        `(total / count).mean()`; with `uld_crossentropy_weight` both are [2].
    """
    options = GoldOptions(
        use_extended_uld=use_extended_uld,
        uld_token_merge_strategy=uld_token_merge_strategy,
        uld_use_hybrid_loss=uld_use_hybrid_loss,
        uld_hybrid_matched_weight=uld_hybrid_matched_weight,
        uld_hybrid_unmatched_weight=uld_hybrid_unmatched_weight,
        uld_crossentropy_weight=uld_crossentropy_weight,
        uld_distillation_weight=uld_distillation_weight,
        uld_student_temperature=uld_student_temperature,
        uld_teacher_temperature=uld_teacher_temperature,
        uld_skip_student_eos=uld_skip_student_eos,
        uld_skip_teacher_eos=uld_skip_teacher_eos,
        beta=beta,
        exact=exact,
        chunks=chunks,
        workspace_bytes=workspace_bytes,
    )
    return Gold(options, student_index, teacher_index)(student, teacher, batch)
