"""The configuration of a language model from nothing: five sections, as a YAML file of that trade has them.

`train_config` makes of it what the loop reads, a `TrainConfig`: this file has no training of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenkit.config.later import feature_of
from tokenkit.config.pretrain_train import TrainSection, processes
from tokenkit.config.read import from_dict
from tokenkit.config.train import TrainConfig
from tokenkit.config.values import plain
from tokenkit.data.options import SourceOptions
from tokenkit.errors import ConfigError, at_least
from tokenkit.models.peer_mla.settings import MODEL, model_settings
from tokenkit.options import MOST_TOKENS, flat

OWN = "peer_mla"
"""The `model_type` of a `model_config` that names none."""


@dataclass(frozen=True, kw_only=True)
class DatasetSection:
    """What the model reads."""

    datasets: tuple[SourceOptions, ...]
    """Data sets, mixed by weight; see docs/data.md."""

    tokenizer_name: str
    """Spec, path or hub name."""

    max_seq_length: int = 2048
    """Tokens of a row."""

    pack: bool = True
    """Fill rows with documents that do not see each other. false: a document is a row, and cut."""

    shuffle_buffer_size: int = 10_000
    """Rows of a block: a stream is shuffled inside consecutive blocks."""

    heldout_fraction: float = 0.001
    """Share of the documents that is never trained on."""

    heldout_documents: int = 200
    """How many of those are measured."""

    eval_dataset: str | None = None
    """Other text to measure on: a file, folder or hub name."""

    def __post_init__(self) -> None:
        at_least("dataset_config.max_seq_length", self.max_seq_length, 2, MOST_TOKENS)
        if not self.datasets:
            raise ConfigError("dataset_config.datasets is empty: there is nothing to train on")

    @property
    def streams(self) -> list[str]:
        """The data sets whose length nobody knows."""
        return [source.name or source.location for source in self.datasets if source.streaming]


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Benchmarks during training."""

    evals_registry_path: str | None = None
    """Of OpenAI's evals, which are not run here: evals are names of lm-eval."""

    evals: tuple[str, ...] = ()
    """Names of benchmarks."""

    eval_batch_size: int = 8
    """Prompts of a forward pass."""

    limit: int | None = None
    """Documents of a benchmark. None: all."""

    num_fewshot: int | None = None
    """Examples in front of a question. None: the benchmark's own number."""

    task_data: str | None = None
    """Folder of JSON files with the benchmarks' documents (docs/evaluation.md). None: from the hub."""


@dataclass(frozen=True, kw_only=True)
class WandbSection:
    """Weights & Biases. null: off."""

    project: str = "tokenkit"
    """The project there."""

    entity: str | None = None
    """User or team."""

    name: str | None = None
    """Of the run."""

    log_model: Literal["checkpoints", "all"] | None = None
    """Upload each checkpoint; both words say that."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """What this command alone has."""

    dry_run: bool = False
    """Build the model without memory for its weights, say how large it is and what training it takes; no data
    is read and nothing written."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a language model from nothing: PEER layers and latent attention, or any of transformers."""

    model_config: Mapping[str, Any]
    """Settings of the model: those of PEER and MLA (docs/pretrain.md), or, with a model_type, those of that
    architecture in transformers."""

    train_config: TrainSection = field(default_factory=TrainSection)
    dataset_config: DatasetSection
    eval_config: EvalSection = field(default_factory=EvalSection)
    wandb_config: WandbSection | None = None
    own: Own = flat(Own)

    def __post_init__(self) -> None:
        if self.kind == OWN:
            try:
                model_settings({n: value for n, value in self.model_config.items() if n != "model_type"})
            except ValueError as error:
                raise ConfigError(f"model_config: {error}") from error
            self._check_sharding()
        train, data = self.train_config, self.dataset_config
        if (
            train.length.num_train_epochs is not None
            and train.length.steps_per_epoch is None
            and data.streams
        ):
            raise ConfigError(
                f"train_config.num_train_epochs needs steps_per_epoch, since {', '.join(data.streams)} "
                "streams and has no length: set it, or max_steps instead of both"
            )
        if self.eval_config.evals and (feature := feature_of("eval.tasks")) and not self.own.dry_run:
            raise ConfigError(
                f"eval_config.evals ({', '.join(self.eval_config.evals)}) are not run during training yet, "
                f"they come with {feature}: leave them out (--eval-config.evals [])"
            )
        positions = self.model_config.get("max_position_embeddings")
        if isinstance(positions, int) and data.max_seq_length > positions:
            raise ConfigError(
                f"dataset_config.max_seq_length is {data.max_seq_length}, and the model has {positions} "
                "positions (model_config.max_position_embeddings): lower the one or raise the other"
            )

    def _check_sharding(self) -> None:
        peer: Any = self.model_config.get("peer_config") or {}
        width, ranks = self.model_config.get("hidden_size", MODEL["hidden_size"]), processes()
        if peer.get("sharding") == "columns" and width % ranks:
            raise ConfigError(
                "model_config.peer_config.sharding columns needs processes that divide hidden_size, got "
                f"{ranks} and {width}: take another number of processes, or sharding gathered"
            )

    @property
    def kind(self) -> str:
        """The model's `model_type`."""
        return str(self.model_config.get("model_type", OWN))


def train_config(config: PretrainConfig, steps_per_epoch: int | None = None) -> TrainConfig:
    """Return what the loop reads.

    Args:
        config: the five sections.
        steps_per_epoch: of data that was counted, where the file does not say.

    Raises:
        ConfigError: settings that contradict each other.
    """
    train, data = config.train_config, config.dataset_config
    steps = train.length.max_steps
    if steps is None:
        each = train.length.steps_per_epoch or steps_per_epoch
        assert each is not None
        steps = max(1, round(float(train.length.num_train_epochs or 0) * each))
    settings: dict[str, Any] = {
        "student.pretrained_model_name_or_path": f"a new {config.kind}",
        "student.from_config": {"model_type": OWN, **config.model_config},
        "student.tokenizer_name": data.tokenizer_name,
        "output_dir": train.output_dir,
        "seed": train.seed,
        "resume": _resumes(train),
        "debug": config.own.debug,
        "losses": ["clm"],
        "train_model_mode": "full",
        "steps": steps,
        "warmup_steps": math.ceil(train.rate.warmup_ratio * steps),
        "batch_size": train.portions.rows,
        "gradient_accumulation_steps": train.portions.gradient_accumulation_steps,
        "logging_interval": train.intervals.logging_steps,
        "save_interval": train.intervals.save_steps,
        "eval_interval": train.intervals.eval_steps,
        "eval_batch_size": train.portions.per_device_eval_batch_size,
        "max_length_new": data.max_seq_length,
        "max_length_teacher": data.max_seq_length,
        "pack": data.pack,
        "dtype": train.precision.dtype,
        "tf32": train.precision.tf32,
        "float8": train.precision.float8,
        "attn_implementation": train.attn_implementation,
        "gradient_checkpointing": train.gradient_checkpointing,
        "optimizer.learning_rate": train.rate.learning_rate,
        "optimizer.weight_decay": train.rate.weight_decay,
        "optimizer.beta1": train.rate.adam_beta1,
        "optimizer.beta2": train.rate.adam_beta2,
        "optimizer.max_grad_norm": train.rate.max_grad_norm,
        "optimizer.schedule": train.rate.lr_scheduler_type,
        "data.datasets": [plain(source) for source in data.datasets],
        "data.shuffle_buffer_size": data.shuffle_buffer_size,
        "data.heldout.fraction": data.heldout_fraction,
        "data.heldout.documents": data.heldout_documents,
        "data.heldout.dataset_name": data.eval_dataset,
    }
    settings |= _benchmarks(config.eval_config)
    if (wandb := config.wandb_config) is not None:
        settings |= {
            "report_to": "wandb",
            "wandb.project": wandb.project,
            "wandb.entity": wandb.entity,
            "wandb.log_model": wandb.log_model,
        }
        settings |= {} if wandb.name is None else {"name": wandb.name}
    return from_dict(TrainConfig, settings)


def _benchmarks(asked: EvalSection) -> dict[str, Any]:
    """Return what training calls these settings."""
    if not asked.evals:
        return {}
    return {
        "eval.tasks": list(asked.evals),
        "eval.batch_size": asked.eval_batch_size,
        "eval.limit": asked.limit,
        "eval.num_fewshot": asked.num_fewshot,
        "eval.task_data": asked.task_data,
    }


def _resumes(train: TrainSection) -> bool:
    """Whether to go on, from a checkpoint that must be the newest of the run.

    Raises:
        ConfigError: it is of another folder, or there are newer ones.
    """
    named = train.resume_from_checkpoint
    if named is None or isinstance(named, bool):
        return bool(named)
    folder = Path(train.output_dir).expanduser().resolve()
    path = Path(named).expanduser().resolve()
    if path in (folder, folder / "checkpoints"):
        return True
    if folder not in path.parents:
        raise ConfigError(
            f"train_config.resume_from_checkpoint {named} is not in output_dir {train.output_dir}: a run "
            "goes on in its own folder; set output_dir to that"
        )
    step = int("".join(letter for letter in path.name if letter.isdigit()) or 0)
    names = [entry.name[5:] for entry in (folder / "checkpoints").glob("step_*")]
    saved = sorted(int(name) for name in names if name.isdigit())
    who = f"train_config.resume_from_checkpoint {named}"
    if step not in saved:
        raise ConfigError(
            f"{who}: there is no checkpoint of step {step}, only of {', '.join(map(str, saved)) or 'none'}"
        )
    if step != saved[-1]:
        raise ConfigError(
            f"{who}: a run goes on from its newest checkpoint, and that of step {saved[-1]} is newer: "
            "move it away first"
        )
    return True
