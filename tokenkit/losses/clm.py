"""Next-token prediction: cross entropy on the student's own tokens.

    loss = −Σ log p(token) over unmasked scored student tokens, divided by their number in the whole step

Dimensions: B documents, T student positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenkit.kernels.linear_logprob import DEFAULT_WORKSPACE_BYTES
from tokenkit.losses.score import Rows, check_states, score, scored_tokens, select_rows
from tokenkit.structs import NO_CONTEXT, Batch, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class ClmOptions:
    """How next-token prediction runs."""

    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    """Memory for the head beside results, bytes; more lets it keep what the backward would compute again."""


@dataclass(frozen=True, slots=True)
class ClmPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: scored tokens."""
    rows: Rows


def prepare(
    teacher: HiddenStates | None,
    batch: Batch,
    options: ClmOptions | None = None,
    context: Context = NO_CONTEXT,
) -> ClmPrepared:
    """Find the scored student tokens; the teacher is not used."""
    token_BT = scored_tokens(batch.student)
    return ClmPrepared(token_BT.sum(), select_rows(batch.student, token_BT))


def function(
    student: HiddenStates,
    prepared: ClmPrepared,
    batch: Batch,
    options: ClmOptions | None = None,
    context: Context = NO_CONTEXT,
) -> LossTerm:
    """Return the summed cross entropy, nats, and the number of tokens."""
    workspace_bytes = (options or ClmOptions()).workspace_bytes
    scores = score(student, prepared.rows, workspace_bytes=workspace_bytes)
    return LossTerm(-scores.logp_BT.sum(), prepared.count)


def clm_loss(
    student: HiddenStates, batch: Batch, *, workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
) -> LossTerm:
    """Cross entropy of the student's tokens: the drop-in form. `workspace_bytes`: as in `ClmOptions`.

    Returns:
        total, nats, differentiable in hidden states and head; count, tokens, at least 1 so that
        `total / count` is 0 in a batch without a scored token.
    """
    check_states(student, "student")
    term = function(student, prepare(None, batch), batch, ClmOptions(workspace_bytes))
    return LossTerm(term.total, term.count.clamp_min(1))
