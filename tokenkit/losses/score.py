"""From hidden states to the log-probabilities that a loss asks for, and to nothing else.

The hidden state at position i predicts token i + 1. A loss names tokens, and positions whose mass of
whitespace it needs; the rows that serve neither never reach the head.

Dimensions: B documents, T positions of one side, N rows that are needed, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokenkit.kernels.linear_logprob import DEFAULT_WORKSPACE_BYTES, IGNORE, linear_logprob
from tokenkit.kernels.vocabulary import Subset
from tokenkit.structs import Head, HiddenStates, Side


class Rows(NamedTuple):
    """Which rows of [B·T, D] hidden states a loss needs."""

    row_N: Tensor
    """int64, rising."""
    target_N: Tensor
    """int64 id of the next token, or IGNORE where only the mass is needed."""
    shape: tuple[int, int]
    """B, T."""


class Scores(NamedTuple):
    """What the head says, back in its place; 0 where it was not asked."""

    logp_BT: Tensor
    """log p of each token that was named."""
    mass_BT: Tensor | None
    """log P(the next token is in the subset) at each position."""


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
    if is_wrong_BT.is_cuda:
        torch._assert_async(~is_wrong_BT.any(), words)
    elif not torch.compiler.is_compiling() and bool(is_wrong_BT.any()):
        row, position = is_wrong_BT.nonzero()[0].tolist()
        raise ValueError(
            f"{words}: got {int(side.ids_BT[row, position])} at row {row}, position {position}; what is "
            "not to be trained is False in trained_BT, and no label"
        )


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


def select_rows(side: Side, token_BT: Tensor, mass_BT: Tensor | None = None) -> Rows:
    """Return the rows that predict the named tokens, and those at the named positions.

    Waits for the device once: the number of rows is the size of every GEMM that follows.

    Args:
        side: the tokens.
        token_BT: bool, tokens whose log-probability is needed; never a row's first.
        mass_BT: bool, positions whose mass is needed.
    """
    B, T = side.ids_BT.shape
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
) -> Scores:
    """Run the head on the rows. Differentiable in the hidden states and the head.

    Under autocast the hidden states are of 16 bits and the head's parameters of 32: the head is cast, as
    autocast would. `workspace_bytes` is `linear_logprob`'s.

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
    result = linear_logprob(hidden_ND, head, rows.target_N, subset_V=subset, workspace_bytes=workspace_bytes)

    place = result.logp_N.new_zeros(B * T + 1)
    # token row + 1; a row that serves its mass alone writes 0 to a token that nobody named
    logp_BT = place.index_copy(0, rows.row_N + 1, result.logp_N)[:-1].view(B, T)
    if result.subset_logp_N is None:
        return Scores(logp_BT, None)
    return Scores(logp_BT, place.index_copy(0, rows.row_N, result.subset_logp_N)[:-1].view(B, T))
