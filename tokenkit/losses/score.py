"""Which rows of hidden states a loss reads, which face each other in two models, and what heads say there.

    row of [B·T, D]     position i of a row's tokens: it has read tokens 0..i and predicts token i + 1
    chunk ends          the last tokens of an aligned chunk: both models have read the same text
    chunk starts        the rows that predict a chunk's first tokens: the same, one chunk earlier

A loss names tokens, and positions whose mass of whitespace it needs; the rows that serve neither never reach
a head.

Dimensions: B documents, T student positions (or of one side), S teacher positions, C chunk slots (T + S), N
rows that are needed, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels import deferred
from tokenkit.kernels.chunk_likelihood import Layout, Spans, lay_out
from tokenkit.kernels.head.sharded import vocab_size
from tokenkit.kernels.launch import upload
from tokenkit.kernels.linear_divergence import Outcomes, linear_divergence, match_outcomes
from tokenkit.kernels.linear_logprob import DEFAULT_WORKSPACE_BYTES, IGNORE, Subset, linear_logprob
from tokenkit.losses.shared_options import WORKSPACE_BYTES
from tokenkit.structs import Batch, ChunkKind, Chunks, Context, Head, HiddenStates, Scores, Side


class Rows(NamedTuple):
    """Which rows of [B·T, D] hidden states a loss needs."""

    row_N: Tensor
    """int64, rising."""
    target_N: Tensor
    """int64 id of the next token, or IGNORE where only the mass is needed."""
    shape: tuple[int, int]
    """B, T."""


def scored_tokens(side: Side) -> Tensor:
    """Return [B, T] bool: the tokens that have a log-probability and that the loss mask keeps."""
    T = side.ids_BT.shape[1]
    position_T = torch.arange(T, device=side.ids_BT.device)
    scored_BT = side.trained_BT & (position_T >= 1) & (position_T < side.length_B[:, None])
    check_ids(side, scored_BT)
    return scored_BT


def check_ids(side: Side, scored_BT: Tensor) -> None:
    """Raise ValueError where a label to be ignored stands in place of an id: it would count as certain."""
    is_wrong_BT = scored_BT & (side.ids_BT < 0)
    words = "ids_BT must hold ids of tokens where trained_BT asks for them"
    advice = "what is not to be trained is False in trained_BT, and no label"

    def error(row: int) -> ValueError:
        position = int(is_wrong_BT[row].nonzero()[0])
        found = int(side.ids_BT[row, position])
        return ValueError(f"{words}: got {found} at row {row}, position {position}; {advice}")

    deferred.require(~is_wrong_BT.any(1), f"{words}; {advice}", ValueError, error)


def check_states(states: HiddenStates, side: str) -> None:
    """Raise TypeError where logits, or a model's output, come in place of hidden states."""
    if isinstance(states, HiddenStates):
        return
    raise TypeError(
        f"the {side} must be HiddenStates, [B, T, D] and the head that multiplies them: got "
        f"{type(states).__name__}; logits are never formed here: take "
        "tokenkit.integrations.hidden_states(model, ids)"
    )


def in_dtype(head: Head, dtype: torch.dtype) -> Head:
    """Return the head with its parameters cast as autocast would, so that like is multiplied with like."""
    if head.weight_VD.dtype == dtype:
        return head
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    return replace(head, weight_VD=head.weight_VD.to(dtype), bias_V=bias_V)


def select_rows(side: Side, token_BT: Tensor | None = None, mass_BT: Tensor | None = None) -> Rows:
    """Return the rows that predict the named tokens, and those at the named positions.

    Waits for the device that the tokens are on: the number of rows is the size of every GEMM that follows.

    Args:
        side: the tokens.
        token_BT: bool, tokens whose log-probability is needed; never a row's first. None: `scored_tokens`.
        mass_BT: bool, positions whose mass is needed.
    """
    B, T = side.ids_BT.shape
    token_BT = scored_tokens(side) if token_BT is None else token_BT
    predicts_BT = torch.nn.functional.pad(token_BT[:, 1:], (0, 1))
    target_BT = torch.nn.functional.pad(side.ids_BT[:, 1:], (0, 1)).where(predicts_BT, IGNORE)
    needed_BT = predicts_BT if mass_BT is None else predicts_BT | mass_BT
    row_N = needed_BT.flatten().nonzero()[:, 0]
    return Rows(row_N, target_BT.flatten()[row_N], (B, T))


def score(
    states: HiddenStates,
    rows: Rows,
    subset: Tensor | Subset | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    temperature: float = 1.0,
) -> Scores:
    """Run the head on the rows. Differentiable in the hidden states and the head.

    Under autocast the hidden states are of 16 bits and the head's parameters of 32: the head is cast, as
    autocast would. `workspace_bytes` and `temperature` are `linear_logprob`'s.

    Raises:
        ValueError: if the hidden states are not those of the batch.
    """
    B, T = rows.shape
    if tuple(states.hidden_BTD.shape[:2]) != (B, T):
        raise ValueError(
            f"hidden_BTD must hold one state per token {(B, T)}: got {tuple(states.hidden_BTD.shape)}; "
            "are student and teacher swapped?"
        )
    head = in_dtype(states.head, states.hidden_BTD.dtype)
    if head.weight_VD.shape[-1] != states.hidden_BTD.shape[-1]:
        raise ValueError(
            f"hidden_BTD must be as wide as its head {tuple(head.weight_VD.shape)}: got "
            f"{tuple(states.hidden_BTD.shape)}; are these logits?"
        )
    hidden_ND = states.hidden_BTD.flatten(0, 1).index_select(0, rows.row_N)
    result = linear_logprob(
        hidden_ND,
        head,
        rows.target_N,
        subset_V=subset,
        temperature=temperature,
        workspace_bytes=workspace_bytes,
    )

    place = result.logp_N.new_zeros(B * T + 1)
    # token row + 1; a row that serves its mass alone writes 0 to a token that nobody named
    logp_BT = place.index_copy(0, rows.row_N + 1, result.logp_N)[:-1].view(B, T)
    if result.subset_logp_N is None:
        return Scores(logp_BT, None)
    return Scores(logp_BT, place.index_copy(0, rows.row_N, result.subset_logp_N)[:-1].view(B, T))


def token_nats(states: HiddenStates, side: Side) -> Tensor:
    """Return [B, T] −log p of each token that the loss mask keeps, 0 of every other."""
    return -score(states, select_rows(side), workspace_bytes=WORKSPACE_BYTES).logp_BT


class RowPairs(NamedTuple):
    """Rows of both models that face each other."""

    student_N: Tensor
    """int64 rows of [B·T, D], rising."""
    teacher_N: Tensor
    """int64 rows of [B·S, E], of the same number."""


def chunks_of(batch: Batch, kind: ChunkKind) -> Chunks:
    """Return the batch's chunks of that kind; ValueError names those it has."""
    if kind not in batch.chunks:
        raise ValueError(
            f"the batch has no {kind!r} chunks, only {sorted(batch.chunks)}: "
            "name them in the collator's chunk_kinds"
        )
    return batch.chunks[kind]


def valid_chunks(batch: Batch, kind: ChunkKind) -> Layout:
    """Find the chunks with tokens on both sides, all of them scored and kept by the loss mask."""
    chunks = chunks_of(batch, kind)
    scored_BT, scored_BS = scored_tokens(batch.student), scored_tokens(batch.teacher)
    return lay_out(chunks.student_BT, chunks.teacher_BS, scored_BT, scored_BS)


def aligned_chunks(batch: Batch, kind: ChunkKind) -> Layout:
    """Find the chunks with tokens on both sides, whatever the loss mask says."""
    chunks = chunks_of(batch, kind)
    return lay_out(
        chunks.student_BT,
        chunks.teacher_BS,
        torch.ones_like(chunks.student_BT, dtype=torch.bool),
        torch.ones_like(chunks.teacher_BS, dtype=torch.bool),
    )


def chunk_ends(batch: Batch, kind: ChunkKind) -> RowPairs:
    """Return the last tokens of aligned chunks whose last tokens the loss mask keeps, one row per chunk.

    A leading BOS is a chunk like any other.
    """
    here = batch.on_host
    layout = aligned_chunks(here, kind)
    kept_BC = layout.valid_BC
    for spans, side in ((layout.student, here.student), (layout.teacher, here.teacher)):
        kept_BC = kept_BC & side.trained_BT.gather(1, spans.last_BC.where(layout.valid_BC, 0))
    return on_its_device(batch, _pairs(layout, kept_BC, layout.student.last_BC, layout.teacher.last_BC))


def chunk_starts(batch: Batch, kind: ChunkKind, *, one_to_one: bool = False) -> RowPairs:
    """Return the rows that predict the first tokens of valid chunks.

    Args:
        batch: the batch.
        kind: which of its chunks.
        one_to_one: leave out chunks with more than one token on either side.
    """
    layout = valid_chunks(batch.on_host, kind)
    kept_BC = layout.valid_BC
    if one_to_one:
        kept_BC = kept_BC & (layout.teacher_tokens_BC == 1) & (_tokens(layout.student) == 1)
    first_BC, first_teacher_BC = _first(layout.student), _first(layout.teacher)
    return on_its_device(batch, _pairs(layout, kept_BC, first_BC - 1, first_teacher_BC - 1))


def _pairs(layout: Layout, kept_BC: Tensor, student_BC: Tensor, teacher_BC: Tensor) -> RowPairs:
    T, S = layout.student.slot_BL.shape[1], layout.teacher.slot_BL.shape[1]
    row_B1 = torch.arange(len(kept_BC), device=kept_BC.device)[:, None]
    slot_N = kept_BC.flatten().nonzero()[:, 0]
    return RowPairs((row_B1 * T + student_BC).flatten()[slot_N], (row_B1 * S + teacher_BC).flatten()[slot_N])


def on_its_device(batch: Batch, rows: RowPairs) -> RowPairs:
    """Bring rows that were found in `batch.on_host` to the device of the batch."""
    return rows if batch.host is None else upload(rows, batch.student.ids_BT.device)


def _first(spans: Spans) -> Tensor:
    """Return [B, C] the position of each slot's first own token: a span may begin with tokens of no chunk."""
    B, L = spans.slot_BL.shape
    position_BL = torch.arange(L, device=spans.slot_BL.device).expand(B, L)
    first_BC = torch.full((B, spans.start_BC.shape[1] + 1), L, device=position_BL.device)
    return first_BC.scatter_reduce_(1, spans.slot_BL, position_BL, "amin")[:, :-1]


def _tokens(spans: Spans) -> Tensor:
    """Return [B, C] the number of each slot's own tokens."""
    count_BC = torch.zeros_like(torch.nn.functional.pad(spans.start_BC, (0, 1)))
    return count_BC.scatter_add_(1, spans.slot_BL, torch.ones_like(spans.slot_BL))[:, :-1]


def take(state_BTD: Tensor, side: Side, row_N: Tensor) -> Tensor:
    """Return [N, D] the named rows of a model's states; ValueError where the states are not of this batch."""
    if state_BTD.shape[:2] != side.ids_BT.shape:
        raise ValueError(
            f"hidden_BTD must hold one state per token {tuple(side.ids_BT.shape)}: "
            f"got {tuple(state_BTD.shape)}; are student and teacher swapped?"
        )
    return state_BTD.flatten(0, 1).index_select(0, row_N)


def frozen(head: Head) -> Head:
    """Return the head without a way for gradients into its parameters."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    return replace(head, weight_VD=head.weight_VD.detach(), bias_V=bias_V)


def need_teacher(teacher: HiddenStates | None, name: str) -> HiddenStates:
    """Return the teacher's states, or say that this loss cannot do without."""
    if teacher is None:
        raise ValueError(f"{name} compares with a teacher: got none")
    check_states(teacher, "teacher")
    return teacher


def need_head(head: Head | None, dtype: torch.dtype) -> Head:
    """Return the teacher's head, frozen and of the type of its hidden states."""
    if head is None:
        raise ValueError("this loss multiplies with the teacher's head: give it as Context.teacher_head")
    return in_dtype(frozen(head), dtype)


def check_pairs(student_index: Tensor, teacher_index: Tensor) -> None:
    """Raise ValueError unless both are int64 [P] of one length, P at least 1."""
    for name, index_P in (("student_index", student_index), ("teacher_index", teacher_index)):
        if index_P.ndim != 1 or index_P.dtype != torch.int64 or not len(index_P):
            raise ValueError(
                f"{name} must hold the int64 ids of at least one pair: got shape "
                f"{tuple(index_P.shape)}, {index_P.dtype}"
            )
    if len(student_index) != len(teacher_index):
        raise ValueError(
            "student_index and teacher_index must hold one id for each pair: got "
            f"{len(student_index)} and {len(teacher_index)}"
        )


def paired_outcomes(
    student_index: Tensor,
    teacher_index: Tensor,
    context: Context,
    known: dict[tuple[int, int, torch.device], Outcomes],
    *,
    whole: bool,
) -> Outcomes:
    """Find the columns of a divergence over pairs, in the first half: it waits for the device, once per run.

    Args:
        student_index: int64 [P] student ids.
        teacher_index: int64 [P] their partners.
        context: with both heads, whose vocabularies must hold the ids.
        known: what was found for these pairs, by sizes of vocabularies and device; it is added to.
        whole: probabilities are those under the full vocabularies.
    """
    head, teacher_head = context.student_head, context.teacher_head
    if head is None or teacher_head is None:
        raise ValueError("this loss must know both vocabularies: give both heads in its Context")
    device = head.weight_VD.device
    indices = {"student_index": student_index.to(device), "teacher_index": teacher_index.to(device)}
    key = (vocab_size(head), vocab_size(teacher_head), device)
    if torch.compiler.is_compiling():
        return match_outcomes(head, teacher_head, **indices, whole=whole)
    if key not in known:
        known[key] = match_outcomes(head, teacher_head, **indices, whole=whole)
    return known[key]


def summed_divergence(
    student_ND: Tensor, student_head: Head, teacher_NE: Tensor, teacher_head: Head, kind: str, **options: Any
) -> Tensor:
    """Return `linear_divergence` summed over rows: their weights are known, so gradients form at once."""
    one_N = torch.ones(len(student_ND), dtype=torch.float32, device=student_ND.device)
    return linear_divergence(
        student_ND,
        in_dtype(student_head, student_ND.dtype),
        teacher_NE,
        teacher_head,
        kind,
        row_weight_N=one_N,
        **options,
    )
