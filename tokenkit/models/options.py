"""Adapters, and how models are computed, as a user says it. Nothing here loads torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tokenkit.options import OptionError, check_at_least, option

Dtype = Literal["float32", "float16", "bfloat16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]

MOST_RANK = 2**16


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters, with `train_model_mode: lora`."""

    rank: int = option(64, "model_lora_rank")
    """Rank of the adapters."""

    alpha: float | None = option(None, "model_lora_alpha")
    """Scales the adapters by alpha / rank. None: alpha = rank."""

    dropout: float = option(0.0, "model_lora_dropout")
    """Dropout in front of the adapters, in [0, 1)."""

    targets: tuple[str, ...] = option((), "model_lora_targets")
    """Module names such as `q_proj`. Empty: every linear layer of the body."""

    target_regex: str | None = option(None, "model_lora_target_regex")
    """A pattern on full module names, instead of model_lora_targets."""

    layers: str | None = option(None, "model_lora_layers")
    """Layer range, ends included: `0-8` or `0-3,10`. None: all."""

    modules_to_save: tuple[str, ...] = option((), "model_lora_modules_to_save")
    """Modules that are trained whole beside the adapters."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rank", largest=MOST_RANK)
        if not 0 <= self.dropout < 1:
            raise OptionError("{dropout} must lie in [0, 1), got {}", self.dropout)
        if self.targets and self.target_regex is not None:
            raise OptionError("{targets} and {target_regex} are both set: keep the one that is meant")
        if self.target_regex is not None:
            try:
                re.compile(self.target_regex)
            except re.error as error:
                raise OptionError(
                    "{target_regex} {!r} is no regular expression: {}", self.target_regex, error
                ) from error
