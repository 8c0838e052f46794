"""`tokenkit train-hypernet`: a network that writes embeddings for tokenizers which it has not seen.

tokenkit train-hypernet --model.pretrained-model-name-or-path model
    --data.dataset-name stories.txt --steps 500 --output hypernet
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.errors import ConfigError, at_least, blaming_data
from tokenkit.config.models import ModelSource
from tokenkit.config.schema import flat
from tokenkit.data.options import DataOptions
from tokenkit.embeddings.hypernet_options import HypernetOptions

if TYPE_CHECKING:
    from tokenkit.data.mix import Mix
    from tokenkit.training.hypernet import HypernetTrainer


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
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
        for name in ("steps", "batch_size", "resample_every", "logging_interval"):
            at_least(name, getattr(self, name), 1)
        at_least("max_length", self.max_length, 2)
        for name in ("warmup_steps", "identity_steps", "weight_decay", "max_grad_norm", "lexical_weight"):
            at_least(name, getattr(self, name), 0)
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
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
            at_least(f"sampling.{name}", getattr(self, name), 1)
        at_least("sampling.max_tokens", self.max_tokens, self.min_tokens)
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

    schedule: ScheduleConfig = flat(ScheduleConfig)
    hypernet: HypernetOptions = field(default_factory=HypernetOptions)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        """Refuse a network that has nothing to learn."""
        if self.hypernet.architecture == "identity":
            raise ConfigError(
                "hypernet.architecture is identity, which has nothing to train: set it to linear, mlp or "
                "transformer"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(
        lambda: train(parse_command_line(TrainHypernetConfig, argv, program="tokenkit train-hypernet"))
    )


def train(config: TrainHypernetConfig) -> None:
    """Train and write.

    Raises:
        ValueError, FileNotFoundError: a model, a tokenizer or data that cannot be read or do not fit.
        FileExistsError: the output is not empty.
        FloatingPointError: a loss that is not finite.
    """
    from tokenkit.data.mix import open_data
    from tokenkit.embeddings.hypernet_files import save_hypernet
    from tokenkit.embeddings.unigram_sampler import SamplerOptions
    from tokenkit.metrics import MetricsFile, Progress, draw_curves
    from tokenkit.optim import LearningRate, OptimizerOptions
    from tokenkit.run_folder import prepare_output
    from tokenkit.training.hypernet import train_hypernet

    folder, schedule = Path(config.output).expanduser(), config.schedule
    with blaming_data():
        mix, _ = open_data(config.data, schedule.seed)
    trainer, about = _trainer(config, mix)
    prepare_output(folder, resume=False)
    rate = LearningRate(
        OptimizerOptions(
            learning_rate=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            max_grad_norm=schedule.max_grad_norm,
        ),
        schedule.steps,
        schedule.warmup_steps,
    )
    sampler = SamplerOptions(
        **{f.name: getattr(config.sampling, f.name) for f in dataclasses.fields(SamplerOptions)}
    )
    metrics = MetricsFile(folder, step=0, is_main=True)
    progress = Progress(schedule.steps, 0, is_main=True)
    began = time.perf_counter()

    def report(step: int, figures: dict[str, float]) -> None:
        progress.update(step, loss=figures.get("loss/clm", figures.get("loss/identity")))
        if step % schedule.logging_interval == 0 or step in (1, schedule.steps):
            metrics.write(step, figures)

    try:
        train_hypernet(trainer, sampler, rate, report)
    finally:
        progress.close()
        metrics.close()
    seconds = round(time.perf_counter() - began, 1)
    save_hypernet(folder, trainer.hypernet, {**about, "seconds": seconds})
    draw_curves(folder)
    print(f"{schedule.steps} steps in {seconds:.0f} s: {folder}")


def _trainer(config: TrainHypernetConfig, mix: Mix) -> tuple[HypernetTrainer, dict[str, Any]]:
    """Load the model, and return its trainer and what the hypernetwork's JSON says beside its shape."""
    import torch

    from tokenkit.config.read import to_dict
    from tokenkit.embeddings.hypernet import Hypernet
    from tokenkit.embeddings.hypernet_files import rows_digest
    from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
    from tokenkit.models.fingerprint import model_fingerprint
    from tokenkit.tokenization.byteify import load_tokenizer
    from tokenkit.training.hypernet import HypernetTrainer, HypernetTraining, old_matrices

    source, schedule = config.model, config.schedule
    name = source.pretrained_model_name_or_path
    with blaming_data():
        old = load_tokenizer(
            source.tokenizer_name or name,
            revision=source.revision,
            trust_remote_code=config.trust_remote_code,
        )
        options = LoadOptions(revision=source.revision, trust_remote_code=config.trust_remote_code)
        model = load_causal_lm(name, old.vocab_size, options)
        matrices = old_matrices(model, old)
    writes = 2 if config.output_embeddings_mode == "untie" else len(matrices)
    torch.manual_seed(schedule.seed)
    hypernet = Hypernet(config.hypernet, matrices[0].shape[1], reads=len(matrices), writes=writes).fit_scale(
        matrices
    )
    training = HypernetTraining(
        steps=schedule.steps,
        identity_steps=schedule.identity_steps,
        batch_size=schedule.batch_size,
        max_length=schedule.max_length,
        tokenizer_texts=config.sampling.texts,
        resample_every=schedule.resample_every,
        distractors=config.sampling.distractors,
        lexical_weight=schedule.lexical_weight,
        seed=schedule.seed,
    )
    commit = getattr(model.config, "_commit_hash", None)
    about = {
        "base_model": {
            "name": name,
            "fingerprint": model_fingerprint(name, commit),
            "rows": rows_digest(matrices),
        },
        "old_tokenizer": {"name": source.tokenizer_name or name, "fingerprint": old.fingerprint()},
        "config": to_dict(config),
    }
    return HypernetTrainer(model, old, hypernet, _texts(mix), training), about


def _texts(mix: Mix) -> Iterator[str]:
    """Yield the texts of a mix; of conversations, what is said."""
    for document in mix:
        yield document.text or "\n".join(message.content for message in document.messages or ())


if __name__ == "__main__":
    raise SystemExit(main())
