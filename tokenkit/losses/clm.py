"""Next-token prediction: cross entropy on the student's own tokens.

    loss = −Σ log p(token) over unmasked scored student tokens, divided by their number in the whole step

Dimensions: B documents, T student positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenkit.kernels.linear_logprob import IGNORE
from tokenkit.losses.base import Loss
from tokenkit.losses.options import WORKSPACE_BYTES, ClmOptions
from tokenkit.losses.score import Rows, score, select_rows
from tokenkit.structs import NO_CONTEXT, Batch, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class ClmPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: scored tokens."""
    rows: Rows


class Clm(Loss[ClmOptions]):
    """Cross entropy of the student's tokens."""

    needs_teacher = False

    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> ClmPrepared:
        """Find the scored student tokens; the teacher is not used."""
        rows = select_rows(batch.student)
        return ClmPrepared((rows.target_N != IGNORE).sum(), rows)

    def loss(
        self, student: HiddenStates, prepared: ClmPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed cross entropy, nats, and the number of tokens."""
        scores = score(student, prepared.rows, workspace_bytes=self.options.workspace_bytes)
        return LossTerm(-scores.logp_BT.sum(), prepared.count)


def clm_loss(student: HiddenStates, batch: Batch, *, workspace_bytes: int = WORKSPACE_BYTES) -> LossTerm:
    """Cross entropy of the student's tokens: the drop-in form. `workspace_bytes`: as in `ClmOptions`.

    Returns:
        total, nats, differentiable in hidden states and head; count, tokens, at least 1 so that
        `total / count` is 0 in a batch without a scored token.
    """
    return Clm(ClmOptions(workspace_bytes=workspace_bytes))(student, None, batch)
