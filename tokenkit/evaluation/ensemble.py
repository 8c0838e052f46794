"""Several models that say one next token: their distributions over one vocabulary, combined at every token.

    mean_prob      p(v) = Σ_k w_k p_k(v)
    mean_logits    p(v) ∝ exp(Σ_k w_k z_k(v)) ∝ Π_k p_k(v)^w_k
    max            p(v) ∝ max_k p_k(v)

The text is cut once, by the tokenizer of the first member, the pivot. A member that shares it reads the same
ids. One with another tokenizer reads, for each id of the pivot, the nearest of its own, and says of an id of
the pivot what it says of that one, over the pivot's ids alone: z_k(v) is its logit at map(v).

Where only log p of given tokens is asked of mean_prob, each member's `linear_logprob` says all that is
needed. The mean of logits is one head over all hidden states side by side. Elsewhere logits are formed for a
few rows at a time: none of [tokens, vocabulary] exist.

Dimensions: K members, B rows of text, T positions, N scored tokens, V vocabulary of the pivot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenkit.evaluation.scorer import ModelScorer, Stop
from tokenkit.kernels.head.products import write_products
from tokenkit.kernels.head.tiles import chunks
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.structs import Head

if TYPE_CHECKING:
    from tokenkit.evaluation.opened import Opened

Combination = Literal["mean_prob", "mean_logits", "max"]
WORKSPACE_BYTES = 128 * 2**20  # of logits that exist at once


@dataclass(frozen=True)
class Member:
    """One model of an ensemble."""

    opened: Opened
    map_V: Tensor | None = None
    """int64, this member's id for each id of the pivot. None: they are the same."""

    def reads(self, ids: Tensor) -> Tensor:
        """Return this member's ids in place of the pivot's; those of padding rows are as that of id 0."""
        if self.map_V is None:
            return ids
        return self.map_V[torch.where(ids < len(self.map_V), ids, 0)]

    def says(self, logits_NW: Tensor) -> Tensor:
        """Return what logits over this member's ids are over the pivot's."""
        return logits_NW if self.map_V is None else logits_NW[:, self.map_V]


class Likelihoods(NamedTuple):
    """What is said of given tokens."""

    logp_N: Tensor
    """Of the ensemble, nats, float32."""
    members_KN: Tensor
    """Of each member alone."""
    is_top_N: Tensor | None
    """Whether no other token is more likely to the ensemble; None: this was not asked."""


class Ensemble:
    """Models that are asked as one: a `Scorer`.

    Args:
        members: the pivot first.
        combination: how distributions become one.
        weights: of the members in a mean, above 0 and of sum 1; None: all the same.
        workspace_bytes: memory for logits.
    """

    def __init__(
        self,
        members: Sequence[Member],
        combination: Combination = "mean_prob",
        weights: Sequence[float] | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
    ):
        self.members, self.combination = list(members), combination
        self.weights = list(weights or [1 / len(members)] * len(members))
        self.pivot = members[0].opened
        self.vocab_size = self.pivot.tokenizer.vocab_size
        self._workspace_bytes = workspace_bytes

    @property
    def positions(self) -> int | None:
        """Tokens that all members can read."""
        known = [member.opened.positions for member in self.members]
        return min((limit for limit in known if limit is not None), default=None)

    @property
    def device(self) -> torch.device:
        """Where ids are handed over."""
        return self.pivot.device

    def score(self, ids_BT: Tensor, at_N: tuple[Tensor, Tensor], target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of each target, and whether no other token is more likely: see `Scorer`."""
        if self.combination == "mean_logits" and (head := self._joined_head) is not None:
            with torch.no_grad():
                found = (member.opened.causal(ids_BT) for member in self.members)
                joined = linear_logprob(
                    self._side_by_side([(s.hidden_BTD[at_N], s.head) for s in found]), head, target_N
                )
            return joined.logp_N, joined.is_top1_N
        said = self.likelihoods(ids_BT, at_N, target_N)
        assert said.is_top_N is not None
        return said.logp_N, said.is_top_N

    def _side_by_side(self, states: Sequence[tuple[Tensor, Head]]) -> Tensor:
        """Return the hidden states that `_joined_head` multiplies, [N, sum of the members' D]."""
        weighed = zip(self.weights, states, strict=True)
        return torch.cat([w * head.scale * hidden_ND for w, (hidden_ND, head) in weighed], -1)

    @cached_property
    def _joined_head(self) -> Head | None:
        """One head that gives the mean of all logits from all hidden states side by side.

        None: a member's ids are others, or a softcap stands between.
        """
        heads = [member.opened.causal.head() for member in self.members]
        if any(member.map_V is not None for member in self.members) or any(head.softcap for head in heads):
            return None
        V, biases = self.vocab_size, [head.bias_V for head in heads]
        weight_VD = torch.cat([head.weight_VD[:V] for head in heads], -1)
        if all(bias_V is None for bias_V in biases):
            return Head(weight_VD, vocab_size=V)
        scaled = zip(self.weights, heads, biases, strict=True)
        bias_V = sum(w * head.scale * bias_V[:V] for w, head, bias_V in scaled if bias_V is not None)
        return Head(weight_VD, torch.as_tensor(bias_V), vocab_size=V)

    def generate(
        self, prompts: Sequence[list[int]], stop: Stop, options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Return what is written behind each prompt: see `Scorer`."""
        from tokenkit.evaluation.lockstep import Lockstep

        lengths = torch.tensor([len(ids) for ids in prompts])
        longest = int(lengths.max())
        is_text_BT = (torch.arange(longest) >= longest - lengths[:, None]).long()
        joined = Lockstep(self, is_text_BT.to(self.device))
        return ModelScorer(self.pivot).generate(prompts, stop, {**options, "logits_processor": [joined]})

    @torch.no_grad()
    def likelihoods(
        self, ids_BT: Tensor, at_N: tuple[Tensor, Tensor], target_N: Tensor, *, asks_top: bool = True
    ) -> Likelihoods:
        """Return log p of given tokens.

        Args:
            ids_BT: int64 ids of the pivot, padded on the right.
            at_N: row and position of the token before each target, int64.
            target_N: int64 ids of the pivot.
            asks_top: say too whether a target is the likeliest.
        """
        states = []
        for member in self.members:
            found = member.opened.causal(member.reads(ids_BT))
            states.append((found.hidden_BTD[at_N], found.head))
        joined = self._joined_head if self.combination == "mean_logits" and not asks_top else None
        shares_ids = all(member.map_V is None for member in self.members)
        if not asks_top and shares_ids and (self.combination == "mean_prob" or joined is not None):
            members_KN = torch.stack([linear_logprob(*pair, target_N).logp_N for pair in states])
            if joined is None:
                return Likelihoods(self._mean_of(members_KN), members_KN, None)
            logp_N = linear_logprob(self._side_by_side(states), joined, target_N).logp_N
            return Likelihoods(logp_N, members_KN, None)
        widest = max(member.opened.tokenizer.vocab_size for member in self.members)
        parts = []
        for rows in chunks(len(target_N), 3 * 4 * widest, self._workspace_bytes):
            logits = (
                member.says(logits_of(hidden_ND[rows], head))
                for member, (hidden_ND, head) in zip(self.members, states, strict=True)
            )
            parts.append(self._said(logits, target_N[rows]))
        none = Likelihoods(target_N.float(), target_N.float().expand(len(states), -1), target_N.bool())
        logp_N, members_KN, is_top_N = (
            (torch.cat(some, -1) for some in zip(*parts, strict=True)) if parts else none
        )
        return Likelihoods(logp_N, members_KN, is_top_N)

    def combined(self, logits: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Combine what the members say of the next token.

        Args:
            logits: of each member, float32 [N, V] over the pivot's ids; they are overwritten.

        Returns:
            [N, V], probabilities for mean_prob, for the others log-probabilities up to a constant of the row;
            of each member the log-sum-exp [N] of its logits.
        """
        total_NV: Tensor | None = None
        scales = []
        for weight, z_NV in zip(self.weights, logits, strict=True):
            if self.combination == "mean_prob":
                top_N1 = z_NV.amax(-1, keepdim=True)
                sum_N1 = z_NV.sub_(top_N1).exp_().sum(-1, keepdim=True)
                scales.append((top_N1 + sum_N1.log())[:, 0])
                z_NV.mul_(weight / sum_N1)
            else:
                scales.append(z_NV.logsumexp(-1))
                z_NV.mul_(weight) if self.combination == "mean_logits" else z_NV.sub_(scales[-1][:, None])
            if total_NV is None:
                total_NV = z_NV
            else:
                torch.maximum(total_NV, z_NV, out=total_NV) if self.combination == "max" else total_NV.add_(
                    z_NV
                )
        assert total_NV is not None
        return total_NV, scales

    def next_logp(self, logits: Iterable[Tensor]) -> Tensor:
        """Return log p of every next token, float32 [N, V], from the members' logits, overwritten."""
        total_NV, _ = self.combined(logits)
        return total_NV.log() if self.combination == "mean_prob" else total_NV.log_softmax(-1)

    def _said(self, logits: Iterable[Tensor], target_N: Tensor) -> Likelihoods:
        of_target: list[Tensor] = []

        def noted() -> Iterable[Tensor]:
            for z_NV in logits:
                of_target.append(z_NV.gather(-1, target_N[:, None])[:, 0])
                yield z_NV

        total_NV, scales = self.combined(noted())
        members_KN = torch.stack([z_N - scale_N for z_N, scale_N in zip(of_target, scales, strict=True)])
        total_N = total_NV.gather(-1, target_N[:, None])[:, 0]
        is_top_N = total_N >= total_NV.amax(-1)
        if self.combination == "mean_prob":
            return Likelihoods(self._mean_of(members_KN), members_KN, is_top_N)
        return Likelihoods(total_N - total_NV.logsumexp(-1), members_KN, is_top_N)

    def _mean_of(self, logp_KN: Tensor) -> Tensor:
        """Return log Σ_k w_k p_k."""
        logs = [math.log(weight) for weight in self.weights]
        return (logp_KN + torch.tensor(logs, device=logp_KN.device)[:, None]).logsumexp(0)


def logits_of(hidden_ND: Tensor, head: Head) -> Tensor:
    """Return the logits of real tokens, float32 [N, V]: for a few rows."""
    V = len(head.weight_VD) if head.vocab_size is None else head.vocab_size
    z_NV = torch.empty((len(hidden_ND), V), dtype=torch.float32, device=hidden_ND.device)
    write_products(hidden_ND, head.weight_VD, slice(0, V), z_NV)
    if head.bias_V is not None:
        z_NV.add_(head.bias_V[:V])
    if head.scale != 1:
        z_NV.mul_(head.scale)
    if head.softcap is not None:
        z_NV.div_(head.softcap).tanh_().mul_(head.softcap)
    return z_NV
