"""Several models that say one next token: their distributions over one vocabulary, combined at every token.

    mean_prob      p(v) = Σ_k w_k p_k(v)
    mean_logits    p(v) ∝ exp(Σ_k w_k z_k(v)) ∝ Π_k p_k(v)^w_k
    max            p(v) ∝ max_k p_k(v)

The text is cut once, by the tokenizer of the first member, the pivot. A member that shares it reads the same
ids. One with another tokenizer reads, for each id of the pivot, the nearest of its own, and says of an id of
the pivot what it says of that one, over the pivot's ids alone: z_k(v) is its logit at map(v).

Given tokens are scored by `linear_ensemble`, which multiplies each head once: no logits of all tokens exist.
For the next token to be written they do, one row for each text.

Dimensions: K members, B rows of text, T positions, N scored tokens, V vocabulary of the pivot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenkit.evaluation.scorer import ModelScorer, Stop
from tokenkit.kernels.deferred import raise_found
from tokenkit.kernels.linear_ensemble import Combination, EnsembleLogprob, Part, linear_ensemble

if TYPE_CHECKING:
    from tokenkit.evaluation.opened import Opened


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

    def says(self, logits_NW: Tensor, vocab_size: int) -> Tensor:
        """Return what logits over this member's ids are over the pivot's, of which there are `vocab_size`."""
        return logits_NW[:, :vocab_size] if self.map_V is None else logits_NW[:, self.map_V]


class Ensemble:
    """Models that are asked as one: a `Scorer`.

    Args:
        members: the pivot first.
        combination: how distributions become one.
        weights: of the members in a mean, above 0 and of sum 1; None: all the same.
        workspace_bytes: memory for what is kept of a few tokens' logits. None: see `linear_ensemble`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        combination: Combination = "mean_prob",
        weights: Sequence[float] | None = None,
        workspace_bytes: int | None = None,
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
        said = self.likelihoods(ids_BT, at_N, target_N, asks_members=False)
        raise_found()
        assert said.is_top1_N is not None
        return said.logp_N, said.is_top1_N

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
        self,
        ids_BT: Tensor,
        at_N: tuple[Tensor, Tensor],
        target_N: Tensor,
        *,
        asks_top: bool = True,
        asks_members: bool = True,
    ) -> EnsembleLogprob:
        """Return log p of given tokens.

        Args:
            ids_BT: int64 ids of the pivot, padded on the right.
            at_N: row and position of the token before each target, int64.
            target_N: int64 ids of the pivot.
            asks_top: say too whether a target is the likeliest.
            asks_members: say too what each member alone says.
        """
        parts = []
        for member, weight in zip(self.members, self.weights, strict=True):
            found = member.opened.causal(member.reads(ids_BT))
            parts.append(Part(found.hidden_BTD[at_N], found.head, weight, member.map_V))
        return linear_ensemble(
            parts,
            target_N,
            self.combination,
            asks_top=asks_top,
            asks_members=asks_members,
            workspace_bytes=self._workspace_bytes,
        )

    def next_logp(self, logits: Iterable[Tensor], *, is_normalised: bool = True) -> Tensor:
        """Return log p of every next token, float32 [N, V].

        Args:
            logits: of each member, float32 [N, V] over the pivot's ids; they are left as they are.
            is_normalised: where a constant of each row does not matter, it need not be subtracted.
        """
        total_NV: Tensor | None = None
        for weight, z_NV in zip(self.weights, logits, strict=True):
            if self.combination == "mean_logits":
                total_NV = z_NV * weight if total_NV is None else total_NV.add_(z_NV, alpha=weight)
            elif self.combination == "max":
                logp_NV = z_NV.log_softmax(-1)
                total_NV = logp_NV if total_NV is None else torch.maximum(total_NV, logp_NV, out=total_NV)
            else:
                p_NV = z_NV.softmax(-1)
                total_NV = p_NV.mul_(weight) if total_NV is None else total_NV.add_(p_NV, alpha=weight)
        assert total_NV is not None
        if self.combination == "mean_prob":
            return total_NV.log_()
        return total_NV.log_softmax(-1) if is_normalised else total_NV
