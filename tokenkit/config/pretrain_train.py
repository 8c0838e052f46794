"""`train_config` of `tokenkit pretrain`: how the model is trained."""

import math
import os
from dataclasses import dataclass
from typing import Literal

from tokenkit.errors import ConfigError, at_least
from tokenkit.models.options import Attention, Dtype
from tokenkit.optim_options import LearningRateSchedule
from tokenkit.options import MOST_DOCUMENTS, MOST_STEPS, flat


def processes() -> int:
    """Return how many processes this start has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, kw_only=True)
class Portions:
    """How many rows are taken at once."""

    per_device_train_batch_size: int = 8
    """Rows of a micro-batch, on each process."""

    per_device_eval_batch_size: int = 8
    """Documents that are measured together, on each process."""

    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step, on each process."""

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            at_least(f"train_config.{name}", getattr(self, name), 1, MOST_DOCUMENTS)
        at_least("train_config.gradient_accumulation_steps", self.gradient_accumulation_steps, 1)

    @property
    def rows(self) -> int:
        """Rows of an optimizer step, over all processes of this start."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes()


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long training is: either of the two ways."""

    max_steps: int | None = None
    """Optimizer steps. Either this or num_train_epochs."""

    num_train_epochs: float | None = None
    """Passes over the data. With streaming data it needs steps_per_epoch; else the documents are counted, or
    with packing their tokens."""

    steps_per_epoch: int | None = None
    """Optimizer steps of a pass."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "steps_per_epoch"):
            at_least(f"train_config.{name}", getattr(self, name), 1, MOST_STEPS)
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError(
                f"train_config.max_steps ({self.max_steps}) and num_train_epochs ({self.num_train_epochs:g}) "
                "are both set, and either says how long training is: keep one"
            )
        if self.max_steps is None and self.num_train_epochs is None:
            raise ConfigError(
                "nothing says how long to train: set train_config.max_steps, or num_train_epochs"
            )
        if self.steps_per_epoch is not None and self.num_train_epochs is None:
            raise ConfigError("train_config.steps_per_epoch goes with num_train_epochs, which is not set")
        if self.num_train_epochs is not None and not 0 < self.num_train_epochs < math.inf:
            raise ConfigError(f"train_config.num_train_epochs must be positive, got {self.num_train_epochs}")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The optimizer and its learning rate."""

    learning_rate: float = 5e-5
    """Peak of the schedule."""

    weight_decay: float = 0.01
    """Decoupled decay of matrices."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    max_grad_norm: float = 1.0
    """A larger global gradient norm is scaled down to this. 0: no clipping."""

    lr_scheduler_type: LearningRateSchedule = "cosine"
    """Shape of the learning rate behind the warmup."""

    warmup_ratio: float = 0.0
    """Share of all steps in which the rate rises to its peak."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"train_config.warmup_ratio must lie in [0, 1], got {self.warmup_ratio}")


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """How often what happens, and what is said."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What the loggers of this package let through."""

    logging_steps: int = 100
    """Optimizer steps between two lines of metrics."""

    save_steps: int = 1000
    """Optimizer steps between two checkpoints."""

    eval_steps: int = 1000
    """Optimizer steps between two measurements."""

    def __post_init__(self) -> None:
        for name in ("logging_steps", "save_steps", "eval_steps"):
            at_least(f"train_config.{name}", getattr(self, name), 1, MOST_STEPS)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What computes; weights stay float32."""

    fp16: bool = False
    """Compute in float16, with a loss scale."""

    bf16: bool = False
    """Compute in bfloat16."""

    tf32: bool = False
    """Let GPUs round the inputs of float32 products."""

    float8: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = "none"
    """Linear layers in float8, through torchao, by one of its recipes."""

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise ConfigError("train_config.fp16 and bf16 are both true: one type computes, keep one")
        if self.float8 != "none" and self.fp16:
            raise ConfigError(
                f"train_config.float8 ({self.float8}) goes with bfloat16, and fp16 is true: set fp16 to false"
            )

    @property
    def dtype(self) -> Dtype:
        """What computes."""
        if self.fp16:
            return "float16"
        return "bfloat16" if self.bf16 or self.float8 != "none" else "float32"


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How the model is trained."""

    output_dir: str = "outputs/pretrain"
    """Folder of checkpoints, metrics and, at the end, the model."""

    seed: int = 42
    """Of weights and data order."""

    attn_implementation: Attention | None = None
    """Attention of the model. None: the library's default."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    resume_from_checkpoint: bool | str | None = None
    """The newest checkpoint in output_dir, by its path or that of the run; true, or --resume alone: whatever
    is the newest."""

    portions: Portions = flat(Portions)
    length: Length = flat(Length)
    rate: Rate = flat(Rate)
    intervals: Intervals = flat(Intervals)
    precision: Precision = flat(Precision)
