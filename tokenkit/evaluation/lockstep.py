"""Members of an ensemble that write together: one runs `generate`, the others follow it, token by token.

`generate` of transformers, called on the pivot, chooses tokens as it always does; before it chooses, a logits
processor hands the same tokens to all other members, each with a cache of its own, and puts the combined
distribution in the place of the pivot's.

Dimensions: B rows, beams included; T tokens so far; V, W vocabularies of the pivot and of a member.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenkit.evaluation.ensemble import Ensemble, Member


class Lockstep:
    """The logits processor. One object serves one call of `generate`.

    Args:
        ensemble: the members.
        is_text_BT: int64 mask of the prompts, which are padded on the left.
    """

    def __init__(self, ensemble: Ensemble, is_text_BT: Tensor):
        self._ensemble, self._is_text_BT = ensemble, is_text_BT
        self._mask_BT: Tensor | None = None
        """Of all that was read, each text once for each beam."""
        self._followers = [Follower(member, ensemble.vocab_size) for member in ensemble.members[1:]]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log p of the next tokens to the ensemble, without beams up to a constant of each row.

        Ids that are none get −∞.

        Args:
            input_ids: int64 [B, T] of the pivot, the prompt included.
            scores: [B, W] the pivot's logits, or log-probabilities.
        """
        V, (B, T) = self._ensemble.vocab_size, input_ids.shape
        beams = B // len(self._is_text_BT)
        if self._mask_BT is None:
            self._mask_BT = self._is_text_BT.repeat_interleave(beams, 0)
        new_BT = self._mask_BT.new_ones(B, T - self._mask_BT.shape[1])
        self._mask_BT = torch.cat([self._mask_BT, new_BT], 1)
        logits = [scores[:, :V].float()]
        logits += [
            follower.logits(input_ids, self._mask_BT).to(scores.device) for follower in self._followers
        ]
        said_BV = self._ensemble.next_logp(logits, is_normalised=beams > 1)  # only beams add up rows' numbers
        if scores.shape[1] == V and said_BV.dtype == scores.dtype:
            return said_BV
        result = torch.full_like(scores, -torch.inf)
        result[:, :V] = said_BV
        return result


class Follower:
    """A member that reads what another one writes.

    Args:
        member: with a cache of its own.
        vocab_size: of the pivot.
    """

    def __init__(self, member: Member, vocab_size: int):
        self._member, self._vocab_size, self._cache = member, vocab_size, None
        self._read_BT: Tensor | None = None
        model = member.opened.model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the logits of the next token over the pivot's ids, float32 [B, V]."""
        opened = self._member.opened
        self._follow_beams(ids_BT)
        length = 0 if self._cache is None or self._read_BT is None else self._read_BT.shape[1]
        own_BT = self._member.reads(ids_BT.to(opened.device))
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0).to(opened.device)
        inputs: dict[str, Any] = opened.model.prepare_inputs_for_generation(
            own_BT,
            next_sequence_length=ids_BT.shape[1] - length,
            past_key_values=self._cache,
            attention_mask=mask_BT.to(opened.device),
            use_cache=True,
            is_first_iteration=length == 0,
            **({"position_ids": positions_BT} if self._takes_positions else {}),
        )
        found = opened.model(**{**inputs, **self._last}, return_dict=True)
        self._cache = getattr(found, "past_key_values", None)
        self._read_BT = ids_BT
        return self._member.says(found.logits[:, -1].float(), self._vocab_size)

    def _follow_beams(self, ids_BT: Tensor) -> None:
        """Let each row of the cache be that of the row that now begins as it did: beams change places."""
        if self._cache is None or self._read_BT is None:
            return
        begin_BT = ids_BT[:, : self._read_BT.shape[1]]
        if torch.equal(begin_BT, self._read_BT):
            return
        is_same_BB = (begin_BT[:, None] == self._read_BT[None]).all(-1)
        assert is_same_BB.any(-1).all()
        self._cache.reorder_cache(is_same_BB.int().argmax(-1))
