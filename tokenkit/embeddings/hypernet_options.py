"""The shape of a hypernetwork and its training, as configurations spell them. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from tokenkit.options import MOST_DOCUMENTS, MOST_STEPS, MOST_TOKENS, check_at_least, check_positive

Architecture = Literal["identity", "linear", "mlp", "transformer"]


@dataclass(frozen=True, kw_only=True)
class HypernetOptions:
    """A network that writes embedding rows. Training has none until one of these fields is set."""

    architecture: Architecture = "transformer"
    """identity: no network; linear: one projection of mean, first and last piece of a token; mlp:
    feed-forward blocks between; transformer: blocks over all pieces."""

    num_layers: int = 1
    """Blocks of `mlp` and `transformer`."""

    num_heads: int = 8
    """Attention heads of `transformer`; they must divide the width of the embeddings."""

    residual: bool = True
    """Write the difference from a row, at first 0; false: the row itself."""

    residual_alpha: float = 1.0
    """Weight of that difference."""

    use_attention: bool = True
    """Attend over the pieces of a token."""

    use_attention_mask: bool = True
    """Leave padding out of the attention; it is then not computed at all."""

    shared: bool = True
    """One network for input and output embeddings, where two are written."""

    def __post_init__(self) -> None:
        """Check what does not depend on the model."""
        for name in ("num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"hypernet.{name} must be at least 1, got {getattr(self, name)}")
        if not (self.residual_alpha and math.isfinite(self.residual_alpha)):
            raise ValueError(
                f"hypernet.residual_alpha must be finite and not 0, got {self.residual_alpha}: to have no "
                "network set hypernet.architecture to identity"
            )


@dataclass(frozen=True, kw_only=True)
class HypernetSchedule:
    """How long, and towards what."""

    steps: int = 500
    """Optimizer steps."""

    warmup_steps: int = 10
    """Steps in which the learning rate rises."""

    identity_steps: int = 0
    """First steps, in which the network only learns FVT's rows. With residual it begins with them."""

    batch_size: int = 16
    """Texts of a step."""

    max_length: int = 256
    """Tokens of a text; the rest is cut off."""

    learning_rate: float = 3e-3
    """Peak of a cosine schedule with warm-up; AdamW."""

    weight_decay: float = 0.01
    """Decoupled decay of matrices."""

    max_grad_norm: float = 1.0
    """A larger gradient norm is scaled down to this. 0: no clipping."""

    lexical_weight: float = 0.1
    """Weight of the distance from the old rows of tokens that both tokenizers have."""

    resample_every: int = 1
    """A new tokenizer is drawn every so many steps."""

    seed: int = 0
    """Of the data, the tokenizers and the network."""

    logging_interval: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_at_least(self, 1, "steps", "resample_every", "logging_interval", largest=MOST_STEPS)
        check_at_least(self, 1, "batch_size", largest=MOST_DOCUMENTS)
        check_at_least(self, 2, "max_length", largest=MOST_TOKENS)
        check_at_least(
            self, 0, "warmup_steps", "identity_steps", "weight_decay", "max_grad_norm", "lexical_weight"
        )
        check_positive(self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How tokenizers are drawn."""

    texts: int = 128
    """Texts of which one is drawn."""

    min_tokens: int = 64
    """Fewest tokens that segment text; its characters are always among them."""

    max_tokens: int = 4096
    """Most of them; the number is drawn evenly over orders of magnitude."""

    max_length: int = 16
    """Characters of a token, at most."""

    noise: float = 1.0
    """Largest standard deviation of the noise on log(count), by which tokens are chosen."""

    distractors: int = 1024
    """Most tokens that no text has, in each vocabulary: random strings of old tokens."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_at_least(self, 1, "texts", "min_tokens", "max_length", largest=MOST_DOCUMENTS)
        check_at_least(self, self.min_tokens, "max_tokens", largest=MOST_TOKENS)
        check_at_least(self, 0, "noise", "distractors")
