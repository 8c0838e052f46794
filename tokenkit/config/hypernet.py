"""The configuration of `tokenkit train-hypernet`."""

from dataclasses import dataclass, field
from typing import Literal

from tokenkit.config.models import ModelSource
from tokenkit.data.options import DataOptions
from tokenkit.embeddings.hypernet_options import HypernetOptions, HypernetSchedule, SamplerOptions
from tokenkit.errors import ConfigError, at_least
from tokenkit.options import flat


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
    sampling: SamplerOptions = field(default_factory=SamplerOptions)
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        """Refuse a network that has nothing to learn."""
        if self.hypernet.architecture == "identity":
            raise ConfigError(
                "hypernet.architecture is identity, which has nothing to train: set it to linear, mlp or "
                "transformer"
            )
        at_least("save_interval", self.save_interval, 1)
