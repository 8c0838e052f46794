"""What is asked of a model after training: log p of given tokens, and text behind a prompt.

Dimensions: B rows, T positions, N scored tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tokenkit.kernels.deferred import raise_found
from tokenkit.kernels.linear_logprob import linear_logprob

if TYPE_CHECKING:
    from tokenkit.evaluation.opened import Opened

Stop = Callable[[Sequence[int]], bool]
"""Whether the tokens that were written so far end the answer."""


class Scorer(Protocol):
    """What the adapter needs of a model, or of several that are asked as one."""

    @property
    def positions(self) -> int | None:
        """Tokens that are read at most; None: no limit is known."""

    @property
    def device(self) -> torch.device:
        """Where ids are handed over."""

    def score(self, ids_BT: Tensor, at_N: tuple[Tensor, Tensor], target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of each target, and whether no other token is more likely.

        Args:
            ids_BT: int64, padded on the right.
            at_N: row and position of the token before each target, int64.
            target_N: int64 ids.

        Returns:
            nats, float32 or float64 [N]; bool [N].
        """

    def generate(
        self, prompts: Sequence[list[int]], stop: Stop, options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Return what is written behind each prompt.

        Args:
            prompts: ids, of any lengths.
            stop: asked after every token of a row.
            options: max_new_tokens, and what else `generate` of transformers takes.
        """


class ModelScorer:
    """One model.

    Args:
        opened: the model and its tokenizer.
    """

    def __init__(self, opened: Opened):
        self._causal, self._model, self._tokenizer = opened.causal, opened.model, opened.hf_tokenizer
        self.positions, self.device = opened.positions, opened.device

    @torch.inference_mode()
    def score(self, ids_BT: Tensor, at_N: tuple[Tensor, Tensor], target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of each target under all rows of the head, as the model's logits have them."""
        states = self._causal(ids_BT)
        head = replace(states.head, vocab_size=None)  # padding rows too, which the model's own logits have
        found = linear_logprob(states.hidden_BTD[at_N], head, target_N)
        raise_found()
        return found.logp_N, found.is_top1_N

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], stop: Stop, options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Return what `generate` of transformers writes behind each prompt, up to an end token."""
        longest = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        pad = pad if pad is not None else self._tokenizer.eos_token_id or 0
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        is_text_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])

        def is_done(ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([stop(ids) for ids in ids_BT[:, longest:].tolist()], device=ids_BT.device)

        written_BT = self._model.generate(
            ids_BT.to(self.device),
            attention_mask=is_text_BT.to(self.device),
            pad_token_id=pad,
            stopping_criteria=[is_done],
            **options,
        )
        ends = self._model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return [list(takewhile(lambda id: id not in ends, ids[longest:])) for ids in written_BT.tolist()]
