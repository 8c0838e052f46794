"""What a draft model is worth to a larger one in transformers' assisted generation.

The draft proposes some tokens, the target reads all of them in one forward, keeps those that it would have
written, and adds one of its own. Where both have one vocabulary, ids pass between them; where not,
transformers writes text and cuts it anew for each (`assistant_tokenizer`).

    acceptance             proposed tokens that were kept / proposed tokens
    tokens per step        new tokens / forwards of the target; 1 without a draft

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenkit.evaluation.generation import generation_config
from tokenkit.evaluation.members import same_ids
from tokenkit.evaluation.sampling import Sampling

if TYPE_CHECKING:
    from tokenkit.evaluation.opened import Opened


@dataclass(frozen=True, slots=True)
class Assistance:
    """What was counted over all prompts."""

    tokens: int
    """New ones."""
    steps: int
    """Forwards of the target."""
    proposed: int
    """Tokens that the target read on approval."""
    seconds: float
    texts: list[list[int]]
    """The new tokens behind each prompt."""

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were kept: each step writes one token of the target's own."""
        return (self.tokens - self.steps) / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each forward of the target."""
        return self.tokens / self.steps

    def summary(self, alone: Assistance) -> dict[str, Any]:
        """Return the figures, and how many texts are those of the target alone."""
        same = sum(a == b for a, b in zip(self.texts, alone.texts, strict=True))
        figures = {key: value for key, value in asdict(self).items() if key != "texts"}
        rates = {"acceptance": self.acceptance, "tokens_per_step": self.tokens_per_step}
        return figures | rates | {"same_texts": same, "prompts": len(self.texts)}


class _Forwards:
    """How many tokens the target reads in each forward of a `with`."""

    def __init__(self, model: Any):
        self._model, self.lengths = model, list[int]()

    def __enter__(self) -> _Forwards:
        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids")
            self.lengths.append((ids if ids is not None else kwargs["inputs_embeds"]).shape[1])

        self._handle = self._model.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@torch.no_grad()
def assist(
    target: Opened,
    draft: Opened | None,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    num_assistant_tokens: int | None = None,
) -> Assistance:
    """Write on behind prompts with the target, helped by a draft.

    Args:
        target: the model whose text it is.
        draft: the model that proposes; None: there is none.
        prompts: int64 [1, T] of the target.
        sampling: how the target chooses.
        num_assistant_tokens: that the draft proposes at once. None: as transformers has it.

    Raises:
        ValueError: models with the same ids whose heads have different numbers of rows.
    """
    helped = {} if draft is None else helpers_of(target, draft)
    own = None if draft is None else copy.deepcopy(draft.model.generation_config)
    if draft is not None and num_assistant_tokens is not None:
        settings = draft.model.generation_config
        settings.num_assistant_tokens = num_assistant_tokens
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0  # not fewer where the draft is unsure
    torch.manual_seed(sampling.seed)
    tokens = steps = proposed = 0
    texts, began = [], time.perf_counter()
    try:
        limits = [model.positions for model in (target, draft) if model is not None and model.positions]
        for prompt_1T in prompts:
            new = min([sampling.max_new_tokens, *(limit - prompt_1T.shape[1] for limit in limits)])
            with _Forwards(target.model) as forwards:
                ids_1T = target.model.generate(
                    prompt_1T.to(target.device),
                    attention_mask=torch.ones_like(prompt_1T, device=target.device),
                    generation_config=generation_config(target, sampling, new),
                    **helped,
                )
            texts.append(ids_1T[0, prompt_1T.shape[1] :].tolist())
            tokens += len(texts[-1])
            steps += len(forwards.lengths)
            # the first forward reads the prompt too, each later one the last token that was written
            proposed += sum(forwards.lengths) - prompt_1T.shape[1] - (len(forwards.lengths) - 1)
    finally:
        if draft is not None:
            draft.model.generation_config = own
    return Assistance(tokens, steps, proposed, time.perf_counter() - began, texts)


def helpers_of(target: Opened, draft: Opened) -> dict[str, Any]:
    """Return what `generate` takes for a draft.

    Raises:
        ValueError: transformers would refuse it: the same ids and too few rows, or other ids and as many.
    """
    wanted, rows = (opened.causal.config.vocab_size for opened in (target, draft))
    if not same_ids(target.tokenizer, draft.tokenizer):
        if rows == wanted:
            raise ValueError(
                f"{draft.name} has another tokenizer than {target.name} and as many rows, {rows}, which "
                "transformers takes for one tokenizer: it cannot use the draft before that is moved"
            )
        tokenizers = {"tokenizer": target.hf_tokenizer, "assistant_tokenizer": draft.hf_tokenizer}
        return {"assistant_model": draft.model, **tokenizers}
    if rows > wanted:  # padding alone: the ids are the same
        draft.model.resize_token_embeddings(wanted)
        print(
            f"{draft.name}: its {rows - wanted} last rows are padding that {target.name} has not, and are "
            f"left out; transformers wants that too: resize_token_embeddings({wanted})",
            file=sys.stderr,
        )
    elif rows < wanted:
        raise ValueError(
            f"{draft.name} has the ids of {target.name}, but {rows} rows where that has {wanted}, and "
            "assisted generation wants as many: move it with `tokenkit draft --output`, or with "
            f"pad_to_multiple_of {padding_to(wanted, target.tokenizer.vocab_size)}"
        )
    return {"assistant_model": draft.model}


def padding_to(rows: int, vocab_size: int, largest: int = 2**16) -> int:
    """Return a number of which `rows` is the smallest multiple that holds `vocab_size`.

    Raises:
        ValueError: there is none below `largest`.
    """
    for count in range(1, rows + 1):
        size = rows // count
        if rows % count == 0 and size <= largest and -(-vocab_size // size) * size == rows:
            return size
    raise ValueError(f"no padding makes {rows} rows of {vocab_size} ids")


def table(named: dict[str, dict[str, Any]]) -> str:
    """Return the figures as text."""
    width = max(map(len, named))
    lines = [f"{'':<{width}}  acceptance  tokens/step  proposed  new tokens  seconds  same texts"]
    for name, one in named.items():
        share = f"{one['acceptance']:10.1%}" if one["proposed"] else f"{'-':>10}"
        same = f"{one['same_texts']} of {one['prompts']}"
        lines.append(
            f"{name:<{width}}  {share}  {one['tokens_per_step']:11.2f}  {one['proposed']:8}  "
            f"{one['tokens']:10}  {one['seconds']:7.1f}  {same:>10}"
        )
    return "\n".join(lines)
