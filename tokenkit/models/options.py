"""Adapters, and how models are computed, as a user says it. Nothing here loads torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tokenkit.options import OptionError, check_at_least, option

Dtype = Literal["float32", "float16", "bfloat16"]
Attention = Literal[
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
]
HUB_KERNELS = "kernels-community/"
"""Begins the names of kernels that are fetched from the hub, compiled, by the package `kernels`."""

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


@dataclass(frozen=True, kw_only=True)
class BodyOptions:
    """How the layers of student and teacher are computed. None of it changes what is trained."""

    compile: bool = False
    """Compile each layer with torch.compile. The first steps take minutes longer, and each new length of
    batch may take one of them again."""

    use_liger_kernel: bool = False
    """Use Liger's kernels for norms, gated layers and rotary embeddings, in the architectures that it knows.
    Needs a GPU, and `pip install liger-kernel`."""

    use_flash_attention: bool = False
    """The same as attn_implementation flash_attention_2; needs the `flash` extra, a GPU and 16 bits."""

    attn_implementation: Attention | None = None
    """Attention of the models. None: the library's default (sdpa). flash and flex need a GPU; flash computes
    in 16 bits and needs its package; kernels-community/NAME is compiled code from the hub, which needs the
    package `kernels` and trust_remote_code."""

    def __post_init__(self) -> None:
        if self.use_flash_attention and self.attn_implementation not in (None, "flash_attention_2"):
            raise OptionError(
                "{use_flash_attention} contradicts {attn_implementation} {}: remove one",
                self.attn_implementation,
            )

    @property
    def attention(self) -> str | None:
        """`attn_implementation`, or what `use_flash_attention` says."""
        return "flash_attention_2" if self.use_flash_attention else self.attn_implementation

    @property
    def uses_hub_kernel(self) -> bool:
        """Whether the attention is compiled code from the hub."""
        return (self.attention or "").startswith(HUB_KERNELS)

    @property
    def computes_in_16_bits(self) -> bool:
        """Whether the attention takes no float32."""
        return "flash" in (self.attention or "") or self.uses_hub_kernel
