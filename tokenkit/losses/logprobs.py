"""Log-probabilities that losses request of a head, and one pass of the head that answers them all.

    clm   tokens    x x x x x x
    alm   tokens      x x   x x       one `linear_logprob` over the rows that any of them needs;
          mass          x     x       each loss gets what it named, and 0 elsewhere

A loss that a step runs says before what it will ask (`Loss.teacher_request`, `Loss.student_request`).
Requests of one temperature and of one subset, or of none, share a call, forward and backward. Rows are found
on the CPU where the batch came from there: nothing waits for the device.

Dimensions: B documents, T positions of the side that is asked, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from tokenkit.kernels.launch import upload
from tokenkit.kernels.linear_logprob import Subset
from tokenkit.losses.score import Rows, score, scored_tokens, select_rows
from tokenkit.losses.shared_options import WORKSPACE_BYTES
from tokenkit.structs import HiddenStates, Scores, Side


@dataclass(frozen=True, slots=True, eq=False)
class LogprobRequest:
    """What a loss must know of one side's head."""

    side: Side
    """The tokens, on the host where they came from there (`Batch.on_host`)."""
    token_BT: Tensor
    """bool, where `side` is: tokens whose log-probability is needed; never a row's first."""
    mass_BT: Tensor | None = None
    """bool, likewise: positions where the mass of the subset is needed."""
    subset: Subset | None = None
    temperature: float = 1.0
    """Divides the logits."""
    workspace_bytes: int = WORKSPACE_BYTES
    rows: Rows = field(init=False)
    """Found where `side` is when the request is made, in a first half: on a device that is a wait."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", select_rows(self.side, self.token_BT, self.mass_BT))

    @classmethod
    def of_scored(cls, side: Side, workspace_bytes: int) -> LogprobRequest:
        """Return the request for every token that has a log-probability and that the loss mask keeps."""
        return cls(side, scored_tokens(side), workspace_bytes=workspace_bytes)


def answer(states: HiddenStates, requests: Mapping[str, LogprobRequest | None]) -> dict[str, Scores]:
    """Ask the head for what all the requests need, and give each its part.

    Differentiable in the hidden states and the head. What each would get alone, to rounding: products of
    other sizes are added up in another order.

    Args:
        states: of the side that is asked.
        requests: by loss, all of that side of one batch; None: that loss has none.

    Raises:
        ValueError: if the hidden states are not those of the batch.
        NotFiniteError: where the host can know at once, a row has no log-probability.
    """
    found: dict[str, Scores] = {}
    given = {name: request for name, request in requests.items() if request is not None}
    for names in _groups(given):
        group = [given[name] for name in names]
        joined = group[0] if len(group) == 1 else _joined(group)
        scores = ask(states, joined)
        for name, request in zip(names, group, strict=True):
            found[name] = scores if request is joined else _part(scores, request)
    return found


def ask(states: HiddenStates, request: LogprobRequest) -> Scores:
    """Ask the head for one request."""
    rows, device = request.rows, states.hidden_BTD.device
    rows = rows._replace(row_N=upload(rows.row_N, device), target_N=upload(rows.target_N, device))
    return score(states, rows, request.subset, request.workspace_bytes, request.temperature)


def _groups(requests: Mapping[str, LogprobRequest]) -> list[list[str]]:
    """Return the names that one call serves, those without a subset beside the first that has one."""
    groups: list[list[str]] = []
    for name in sorted(requests, key=lambda name: requests[name].subset is None):
        for group in groups:
            if _share(requests[group[0]], requests[name]):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _share(first: LogprobRequest, other: LogprobRequest) -> bool:
    if first.temperature != other.temperature:
        return False
    if other.subset is None or first.subset is other.subset:
        return True
    return first.subset is not None and torch.equal(first.subset.inside_V, other.subset.inside_V)


def _joined(group: Sequence[LogprobRequest]) -> LogprobRequest:
    masses = [request.mass_BT for request in group if request.mass_BT is not None]
    return LogprobRequest(
        group[0].side,
        reduce(torch.logical_or, [request.token_BT for request in group]),
        reduce(torch.logical_or, masses) if masses else None,
        group[0].subset,
        group[0].temperature,
        max(request.workspace_bytes for request in group),
    )


def _part(scores: Scores, request: LogprobRequest) -> Scores:
    token_BT = upload(request.token_BT, scores.logp_BT.device)
    return Scores(scores.logp_BT.where(token_BT, 0), scores.mass_BT if request.subset is not None else None)
