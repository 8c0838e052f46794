"""Next-token prediction: cross entropy on the student's own tokens.

    loss = −Σ log p(token) over unmasked scored student tokens, divided by their number in the whole step

Dimensions: B documents, T student positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenkit.kernels.launch import upload
from tokenkit.losses.base import Loss
from tokenkit.losses.logprobs import LogprobRequest, ask
from tokenkit.losses.options import WORKSPACE_BYTES, ClmOptions
from tokenkit.structs import NO_CONTEXT, Batch, Context, HiddenStates, LossTerm


@dataclass(frozen=True, slots=True)
class ClmPrepared:
    """What is known before the student runs."""

    count: Tensor
    """int64 scalar: scored tokens."""
    request: LogprobRequest


class Clm(Loss[ClmOptions]):
    """Cross entropy of the student's tokens."""

    needs_teacher = False

    def prepare(
        self, teacher: HiddenStates | None, batch: Batch, context: Context = NO_CONTEXT
    ) -> ClmPrepared:
        """Find the scored student tokens; the teacher is not used."""
        request = LogprobRequest.of_scored(batch.on_host.student, self.options.workspace_bytes)
        return ClmPrepared(upload(request.token_BT.sum(), batch.student.ids_BT.device), request)

    def student_request(self, prepared: ClmPrepared) -> LogprobRequest:
        """Return the request for all scored tokens."""
        return prepared.request

    def loss(
        self, student: HiddenStates, prepared: ClmPrepared, batch: Batch, context: Context = NO_CONTEXT
    ) -> LossTerm:
        """Return the summed cross entropy, nats, and the number of tokens."""
        scores = context.scores or ask(student, prepared.request)
        return LossTerm(-scores.logp_BT.sum(), prepared.count)


def clm_loss(student: HiddenStates, batch: Batch, *, workspace_bytes: int = WORKSPACE_BYTES) -> LossTerm:
    """Cross entropy of the student's tokens: the drop-in form. `workspace_bytes`: as in `ClmOptions`.

    Returns:
        total, nats, differentiable in hidden states and head; count, tokens, at least 1 so that
        `total / count` is 0 in a batch without a scored token.
    """
    return Clm(ClmOptions(workspace_bytes=workspace_bytes))(student, None, batch)
