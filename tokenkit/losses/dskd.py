"""Dual-space knowledge distillation: attention aligns the texts, and each model is read in the other's space.

    Q_i  = query([e_i ; e_{i+1}])                 e: the student's input embeddings, f: the teacher's
    K_j  = [f_j ; f_{j+1}] / std                  std: population, over the step's tokens, without padding
    A_ij = softmax over j of Q_i · K_j / √(2E)    B_ji: over i of the same scores
    u_i  = Σ_j A_ij t2s(h_j / std + f_{j+1} / std)        u: the teacher, in the student's space
    w_j  = Σ_i B_ji s2t(h_i)                              w: the student, in the teacher's space

    loss = mean_i −log p(y_{i+1} | u_i, student's head)                         over scored student targets
         + mean_i divergence(student, u_i)     over those i where u_i's first choice is y_{i+1}
         + mean_j KL(teacher ‖ w_j, teacher's head)                             over scored teacher targets

The three means are the three entries of total and count; because a loss in several parts is the mean of their
quotients, each total carries a factor 3. The second count needs the student's head and embeddings, which is
why the first half of a step reads them, and the stds, which are those of the whole optimizer step: `measure`
adds up a micro-batch, `settle` counts with the sums of all.

No gradient flows into heads and embeddings from the alignment,
nor from the divergence into u: it trains the student's hidden states and head, the cross entropy the
projections, and the last term both.

Causal: i attends to j only if j's text ends no later than i's, and the other way round, as far as chunks
tell: a token's text has been read once its chunk ends. Positions that may attend to nothing are not scored.

Source: Zhang et al. 2024, "Dual-Space Knowledge Distillation for Large Language Models", arXiv:2406.17328.

Dimensions: B documents, T student positions, S teacher positions, D and E hidden sizes, N rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenkit.kernels.kinds import Divergence
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.losses.base import Measured, without_gradient
from tokenkit.losses.dskd_masks import Masks, attend, attention_masks
from tokenkit.losses.options import WORKSPACE_BYTES, DskdOptions
from tokenkit.losses.score import (
    frozen,
    in_dtype,
    need_head,
    need_teacher,
    summed_divergence,
    take,
)
from tokenkit.structs import (
    NO_CONTEXT,
    Batch,
    ChunkKind,
    Context,
    Head,
    HiddenStates,
    LossTerm,
    Side,
    StateKind,
    Widths,
)

STATES: frozenset[StateKind] = frozenset({"embedded"})
_NEEDS = (
    "baseline_dskd needs the input embeddings of both models and the student's head: "
    "HiddenStates.embedded_BTD, Context.student_embedded_BTD and Context.student_head"
)


class Projections(nn.Module):
    """What DSKD trains beside the student: three linear maps between the two spaces."""

    def __init__(self, student: Widths, teacher: Widths):
        super().__init__()
        if teacher.embedding != teacher.hidden:
            raise ValueError(
                "baseline_dskd adds the teacher's embeddings to its hidden states: their widths must be "
                f"equal, got {teacher.embedding} and {teacher.hidden}"
            )
        self.query = nn.Linear(2 * student.embedding, 2 * teacher.embedding)
        self.t2s = nn.Linear(teacher.hidden, student.hidden)
        self.s2t = nn.Linear(student.hidden, teacher.hidden)


@dataclass(frozen=True, slots=True)
class DskdPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 [3]: scored student targets, those that the teacher in the student's space predicts, scored
    teacher targets."""
    key_BSF: Tensor
    """[B, S − 1, 2E] K."""
    value_BSE: Tensor
    """[B, S − 1, E] what t2s projects."""
    masks: Masks
    student_N: Tensor
    """Rows of scored student targets."""
    is_right_N: Tensor
    """Places among them where the teacher in the student's space is right."""
    teacher_N: Tensor
    """Rows of scored teacher targets."""
    teacher_NE: Tensor
    """The teacher's hidden states there."""


@dataclass(frozen=True, slots=True)
class DskdMeasured:
    """What one micro-batch adds to the three standard deviations."""

    sum_K: Tensor
    """float64 [9]: number, sum and sum of squares of what is divided, in the order of `_divided`."""
    hidden_BSE: Tensor
    """The teacher's hidden states."""
    embedded_BSE: Tensor
    """The teacher's input embeddings."""


def _modules(context: Context) -> Projections:
    if not isinstance(context.modules, Projections):
        raise ValueError("baseline_dskd needs its projections: give Context.modules a dskd.Projections")
    return context.modules


def _divided(hidden_BSE: Tensor, embedded_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is divided by a standard deviation of its own: keys, and the two parts of values."""
    next_BSE = embedded_BSE[:, 1:]
    return torch.cat([embedded_BSE[:, :-1], next_BSE], -1), hidden_BSE[:, :-1], next_BSE


def _moments(state_BSE: Tensor, is_real_BS: Tensor) -> Tensor:
    """Return number, sum and sum of squares of the entries of real positions, float64 [3]."""
    sum_BS = state_BSE.sum(-1, dtype=torch.float64)
    square_BS = torch.linalg.vector_norm(state_BSE, dim=-1, dtype=torch.float64).square()
    number = is_real_BS.sum() * state_BSE.shape[-1]
    return torch.stack([number.double(), *(x.where(is_real_BS, 0).sum() for x in (sum_BS, square_BS))])


def _scaled(state_BSE: Tensor, moment_3: Tensor) -> Tensor:
    """Divide by the standard deviation that the moments give, or by 1 where nothing varies."""
    _, mean, square = moment_3 / moment_3[0].clamp_min(1)
    variance = square - mean.square()
    # a difference of two numbers that are equal up to rounding is no variance
    std = variance.where(variance > 1e-12 * square, 1).sqrt()
    return state_BSE / std.to(state_BSE.dtype)


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """Multiply in the type of the states, as autocast would."""
    return nn.functional.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def _scores(embedded_BTD: Tensor, key_BSF: Tensor, modules: Projections) -> Tensor:
    """Return [B, T − 1, S − 1] in float32 or better: a softmax follows."""
    pair_BTD = torch.cat([embedded_BTD[:, :-1], embedded_BTD[:, 1:]], -1).to(key_BSF.dtype)
    score_BTS = _linear(pair_BTD, modules.query) @ key_BSF.transpose(1, 2)
    return score_BTS.to(torch.promote_types(score_BTS.dtype, torch.float32)) / math.sqrt(key_BSF.shape[-1])


def _into_student(score_BTS: Tensor, value_BSE: Tensor, masks: Masks, modules: Projections) -> Tensor:
    value_BSD = _linear(value_BSE, modules.t2s)
    return attend(score_BTS, masks.to_teacher).to(value_BSD.dtype) @ value_BSD


def _into_teacher(score_BTS: Tensor, hidden_BTD: Tensor, masks: Masks, modules: Projections) -> Tensor:
    value_BTE = _linear(hidden_BTD, modules.s2t)
    weight_BST = attend(score_BTS.transpose(1, 2), masks.to_student.transpose(1, 2))
    return weight_BST.to(value_BTE.dtype) @ value_BTE


def _rows(scored_BT: Tensor) -> Tensor:
    """Return rows of [B·T, D] for a mask over [B, T − 1]."""
    return torch.nn.functional.pad(scored_BT, (0, 1)).flatten().nonzero()[:, 0]


def _at(state_BTD: Tensor, row_N: Tensor) -> Tensor:
    """Return rows of [B, T − 1, D] that are numbered as if each row had T positions."""
    T = state_BTD.shape[1] + 1
    return state_BTD.flatten(0, 1).index_select(0, row_N - row_N // T)


def _targets(side: Side, row_N: Tensor) -> Tensor:
    return side.ids_BT.flatten()[row_N + 1]


class Dskd(Measured[DskdOptions]):
    """Each model in the other's space."""

    reads_teacher_head = True

    @property
    def chunks(self) -> ChunkKind | None:
        """Those that say what has been read."""
        return "unconstrained"

    @property
    def states(self) -> frozenset[StateKind]:
        """The input embeddings of both models."""
        return STATES

    def modules(self, student: Widths, teacher: Widths) -> nn.Module:
        """Return the maps between the spaces."""
        return Projections(student, teacher)

    @without_gradient
    def measure(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> DskdMeasured:
        """Add up what the standard deviations of the teacher's embeddings and hidden states are made of."""
        teacher = need_teacher(teacher, "baseline_dskd")
        if teacher.embedded_BTD is None:
            raise ValueError(_NEEDS)
        position_S = torch.arange(1, batch.teacher.ids_BT.shape[1], device=batch.teacher.ids_BT.device)
        is_real_BS = position_S < batch.teacher.length_B[:, None]
        moments = [
            _moments(x_BSE, is_real_BS) for x_BSE in _divided(teacher.hidden_BTD, teacher.embedded_BTD)
        ]
        return DskdMeasured(torch.cat(moments), teacher.hidden_BTD, teacher.embedded_BTD)

    @without_gradient
    def settle(
        self, measured: DskdMeasured, sum_K: Tensor, batch: Batch, context: Context = NO_CONTEXT
    ) -> DskdPrepared:
        """Prepare keys and values, and find where the teacher, seen through the student's head, is right."""
        options = self.options
        embedded_BTD, head = context.student_embedded_BTD, context.student_head
        if embedded_BTD is None or head is None:
            raise ValueError(_NEEDS)
        masks = attention_masks(batch, options.causal)
        divided = _divided(measured.hidden_BSE, measured.embedded_BSE)
        key_BSF, last_BSE, next_BSE = (_scaled(x, sum_K[3 * k : 3 * k + 3]) for k, x in enumerate(divided))
        value_BSE = last_BSE + next_BSE

        score_BTS = _scores(embedded_BTD, key_BSF, _modules(context))
        into_student_BTD = _into_student(score_BTS, value_BSE, masks, _modules(context))
        student_N, teacher_N = _rows(masks.student_BT), _rows(masks.teacher_BS)
        dtype = into_student_BTD.dtype
        scores = linear_logprob(
            _at(into_student_BTD, student_N),
            in_dtype(frozen(head), dtype),
            _targets(batch.student, student_N),
            workspace_bytes=options.workspace_bytes,
        )
        is_right_N = scores.is_top1_N.nonzero()[:, 0]
        counts = [len(student_N), len(is_right_N), len(teacher_N)]
        return DskdPrepared(
            count=torch.stack([torch.full((), count, device=student_N.device) for count in counts]),
            key_BSF=key_BSF,
            value_BSE=value_BSE,
            masks=masks,
            student_N=student_N,
            is_right_N=is_right_N,
            teacher_N=teacher_N,
            teacher_NE=take(measured.hidden_BSE, batch.teacher, teacher_N),
        )

    def loss(
        self, student: HiddenStates, prepared: DskdPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return three sums, nats, each times 3, and the number of things in each."""
        options = self.options
        if student.embedded_BTD is None:
            raise ValueError("baseline_dskd needs the student's input embeddings: HiddenStates.embedded_BTD")
        modules, masks = _modules(context), prepared.masks
        score_BTS = _scores(student.embedded_BTD.detach(), prepared.key_BSF, modules)
        into_student_BTD = _into_student(score_BTS, prepared.value_BSE, masks, modules)
        into_teacher_BSE = _into_teacher(score_BTS, student.hidden_BTD[:, :-1], masks, modules)

        student_ND = take(student.hidden_BTD, batch.student, prepared.student_N)
        head = in_dtype(student.head, student_ND.dtype)
        mirrored_ND = _at(into_student_BTD, prepared.student_N)
        scores = linear_logprob(
            mirrored_ND,
            frozen(head),
            _targets(batch.student, prepared.student_N),
            workspace_bytes=options.workspace_bytes,
        )
        settings: dict[str, Any] = {
            "temperature": options.temperature,
            "teacher_temperature": options.teacher_temperature,
            "workspace_bytes": options.workspace_bytes,
        }
        in_student = summed_divergence(
            student_ND.index_select(0, prepared.is_right_N),
            head,
            mirrored_ND.detach().index_select(0, prepared.is_right_N),
            frozen(head),
            options.divergence,
            skew=options.skew,
            alpha=options.alpha,
            **settings,
        )
        teacher_head: Head = need_head(context.teacher_head, prepared.teacher_NE.dtype)
        mirrored_NE = _at(into_teacher_BSE, prepared.teacher_N)
        in_teacher = summed_divergence(
            mirrored_NE, teacher_head, prepared.teacher_NE, teacher_head, "kl", **settings
        )
        terms = (-scores.logp_N.sum(), in_student, in_teacher)
        return LossTerm(3 * torch.stack([term.to(terms[0].dtype) for term in terms]), prepared.count)


def dskd_loss(
    student: HiddenStates,
    teacher: HiddenStates,
    batch: Batch,
    projections: Projections,
    *,
    divergence: Divergence = "kl",
    skew: float = 0.1,
    alpha: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    causal: bool = True,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> LossTerm:
    """Compare both models in each other's space: the drop-in form.

    Args:
        student: hidden states, head and `embedded_BTD` of the student.
        teacher: the same of the teacher, on its own tokens.
        batch: both tokenizations; with `causal`, their "unconstrained" chunks. Its tokens set the scales.
        projections: the trained maps between the spaces; `tokenkit.make_loss("baseline_dskd").modules` makes
            them.
        divergence: kl, rkl, skl, srkl, js or akl.
        skew: mixing share of skl and srkl, in [0, 1].
        alpha: mass left to the tail in akl, in [0, 1].
        temperature: divides the logits of both models.
        teacher_temperature: multiplies it for the teacher.
        causal: attend only to text that ends no later than one's own.
        workspace_bytes: memory for heads beside results, bytes.

    Returns:
        total and count, [3] each, counts at least 1: the loss is `(total / count).mean()`. Differentiable in
        the student's hidden states and head and in the projections.
    """
    options = DskdOptions(
        divergence=divergence,
        skew=skew,
        alpha=alpha,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        causal=causal,
        workspace_bytes=workspace_bytes,
    )
    return Dskd(options)(student, teacher, batch, projections)
