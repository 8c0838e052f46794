"""The configuration of `tokenkit train-hypernet`."""

from dataclasses import dataclass, field
from typing import Literal

from tokenkit.config.errors import MOST_DOCUMENTS, MOST_STEPS, MOST_TOKENS, ConfigError, at_least
from tokenkit.config.models import ModelSource
from tokenkit.data.options import DataOptions
from tokenkit.embeddings.hypernet_options import HypernetOptions
from tokenkit.options import flat


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
        for name in ("steps", "resample_every", "logging_interval"):
            at_least(name, getattr(self, name), 1, MOST_STEPS)
        at_least("batch_size", self.batch_size, 1, MOST_DOCUMENTS)
        at_least("max_length", self.max_length, 2, MOST_TOKENS)
        for name in ("warmup_steps", "identity_steps", "weight_decay", "max_grad_norm", "lexical_weight"):
            at_least(name, getattr(self, name), 0)
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class TokenizerSampling:
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
        for name in ("texts", "min_tokens", "max_length"):
            at_least(f"sampling.{name}", getattr(self, name), 1, MOST_DOCUMENTS)
        at_least("sampling.max_tokens", self.max_tokens, self.min_tokens, MOST_TOKENS)
        for name in ("noise", "distractors"):
            at_least(f"sampling.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class TrainHypernetConfig:
    """Train a hypernetwork on tokenizers drawn from text, under a frozen model."""

    model: ModelSource

    output: str
    """Folder for hypernet.safetensors, hypernet.json, metrics.jsonl and curves.png; it must be empty."""

    output_embeddings_mode: Literal["preserve", "untie"] = "preserve"
    """preserve: one matrix for a tied model; untie: input and output rows of their own."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    save_interval: int = 100
    """Steps between checkpoints."""

    resume: bool = False
    """Go on from the newest intact checkpoint in output; without one, start."""

    schedule: HypernetSchedule = flat(HypernetSchedule)
    hypernet: HypernetOptions = field(default_factory=HypernetOptions)
    sampling: TokenizerSampling = field(default_factory=TokenizerSampling)
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        """Refuse a network that has nothing to learn."""
        if self.hypernet.architecture == "identity":
            raise ConfigError(
                "hypernet.architecture is identity, which has nothing to train: set it to linear, mlp or "
                "transformer"
            )
        at_least("save_interval", self.save_interval, 1)
