"""What is loaded, what of it is trained, and how: models, adapters, optimizer."""

from dataclasses import dataclass
from typing import Literal

from tokenkit.config.errors import ConfigError, at_least
from tokenkit.config.names import (
    Attention,
    Dtype,
    LearningRateSchedule,
    PrefixTrainable,
    SpecialTokensMode,
)
from tokenkit.config.schema import flat
from tokenkit.embeddings.hypernet_options import HypernetOptions
from tokenkit.tokenization.spec import BYTE, parse_spec


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A pretrained causal language model and the tokenizer that it has."""

    pretrained_model_name_or_path: str
    """Folder or hub name of the model."""

    tokenizer_name: str | None = None
    """Spec of the tokenizer that the model has: `name_or_path:source=Family:...`, a path, or `byte`.
    None: the model's own folder."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The tokenizer that the student ends with."""

    target_tokenizer_name: str | None = None
    """Spec, path or `byte`. None: the student keeps its tokenizer, and a teacher must be named."""

    tokens_to_add: tuple[str, ...] = ()
    """Tokens appended to the target tokenizer."""

    special_tokens_mode: SpecialTokensMode = "identity"
    """Special tokens in the losses. identity: a pair of them is a chunk like any other; ignore: no
    chunk holds one; ignore_pad: padding alone is left out."""

    pad_to_multiple_of: int = 64
    """The student's vocabulary rows are padded to a multiple of this; padding takes no probability."""

    expand_input_ids: bool = False
    """Feed a byte model, at each byte, the longest token of its old tokenizer that ends there. The target
    must be `byte` or have `conversion=byte`."""

    def __post_init__(self) -> None:
        at_least("pad_to_multiple_of", self.pad_to_multiple_of, 1)
        if not self.expand_input_ids:
            return
        spec = parse_spec(self.target_tokenizer_name) if self.target_tokenizer_name else None
        if spec is None or not (spec.name_or_path == BYTE or spec.conversion == "byte"):
            raise ConfigError(
                "expand_input_ids is for students that read bytes, and target_tokenizer_name is "
                f"{self.target_tokenizer_name!r}: set it to byte or NAME:conversion=byte, or set "
                "expand_input_ids to false"
            )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters, with `train_model_mode: lora`."""

    model_lora_rank: int = 64
    """Rank of the adapters."""

    model_lora_alpha: float | None = None
    """Scales the adapters by alpha / rank. None: alpha = rank."""

    model_lora_dropout: float = 0.0
    """Dropout in front of the adapters, in [0, 1)."""

    model_lora_targets: tuple[str, ...] = ()
    """Module names such as `q_proj`. Empty: every linear layer of the body."""

    model_lora_target_regex: str | None = None
    """A pattern on full module names, instead of model_lora_targets."""

    model_lora_layers: str | None = None
    """Layer range, ends included: `0-8` or `0-3,10`. None: all."""

    model_lora_modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapters."""

    def __post_init__(self) -> None:
        at_least("model_lora_rank", self.model_lora_rank, 1, 2**16)
        if not 0 <= self.model_lora_dropout < 1:
            raise ConfigError(f"model_lora_dropout must lie in [0, 1), got {self.model_lora_dropout}")
        if self.model_lora_targets and self.model_lora_target_regex is not None:
            raise ConfigError(
                "model_lora_targets and model_lora_target_regex are both set: keep the one that is meant"
            )


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A first stage that fits embeddings to the first layers of the body, without the layers above."""

    n_prefix_layers: int = 0
    """First transformer layers that this stage runs, in student and teacher; 0: there is no such stage."""

    prefix_steps: int = 0
    """How many of `steps` it takes, the first ones. The schedules of the learning rate and of the losses
    begin after it."""

    prefix_lr: float = 1e-3
    """Learning rate of its first step; it falls linearly to 0."""

    prefix_trainable: PrefixTrainable = "non_overlapping_embeddings"
    """What it trains. non_overlapping_embeddings: the input embeddings of those tokens that the old
    vocabulary does not have, all other rows keep their bits; embeddings: all rows; all: all rows, and what
    the main stage trains in the first n_prefix_layers layers."""

    def __post_init__(self) -> None:
        at_least("n_prefix_layers", self.n_prefix_layers, 0)
        at_least("prefix_steps", self.prefix_steps, 0)
        if (self.n_prefix_layers > 0) != (self.prefix_steps > 0):
            raise ConfigError(
                f"n_prefix_layers is {self.n_prefix_layers} and prefix_steps is {self.prefix_steps}: set "
                "both to at least 1 for a prefix stage, or both to 0"
            )
        if self.prefix_lr <= 0:
            raise ConfigError(f"prefix_lr must be positive, got {self.prefix_lr}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Which parameters move, and in which precision."""

    train_model_mode: Literal["lora", "full", "none"] = "lora"
    """lora: adapters, and one copy of the body serves as teacher too; full: every weight; none: the
    body is frozen."""

    train_embeddings: bool = True
    """Train input and output embeddings of the student."""

    output_embeddings_mode: Literal["preserve", "untie"] = "preserve"
    """preserve: tied stays tied; untie: the head gets its own matrix."""

    dtype: Dtype = "float32"
    """Computation; the parameters that are trained stay float32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""

    use_flash_attention: bool = False
    """The same as attn_implementation flash_attention_2; needs the `flash` extra."""

    loss_workspace_mib: int = 256
    """Memory that a loss may use for logits, beside its results, MiB. More is faster up to a point."""

    attn_implementation: Attention | None = None
    """Attention of the models. None: the library's default (sdpa)."""

    lora: Lora = flat(Lora)
    hypernet: HypernetOptions | None = None
    """A network that is trained between the embeddings and the student; None, or identity: there is none."""

    prefix: Prefix = flat(Prefix)

    def __post_init__(self) -> None:
        if self.use_flash_attention and self.attn_implementation not in (None, "flash_attention_2"):
            raise ConfigError(
                f"use_flash_attention contradicts attn_implementation {self.attn_implementation}: remove one"
            )
        at_least("loss_workspace_mib", self.loss_workspace_mib, 1)
        if self.train_model_mode == "none" and not self.train_embeddings and not self.has_hypernet:
            raise ConfigError(
                "train_model_mode is none, train_embeddings is false and there is no hypernetwork: nothing "
                "would be trained; set one of them otherwise"
            )
        if self.prefix.prefix_steps and not self.train_embeddings:
            raise ConfigError(
                "prefix_steps trains the embeddings, and train_embeddings is false: set it to true, or run "
                "the embeddings alone first (train_model_mode none) and start the next run from its export"
            )
        rows_of_network_alone = self.has_hypernet and self.hypernet is not None and not self.hypernet.residual
        if self.prefix.prefix_steps and rows_of_network_alone:
            raise ConfigError(
                "prefix_steps trains the embeddings, and with hypernet.residual=false the network writes the "
                "rows without them: set it to true, or prefix_steps and n_prefix_layers to 0"
            )
        if self.prefix.prefix_trainable == "all" and self.train_model_mode == "none":
            raise ConfigError(
                "prefix_trainable is all, and train_model_mode none trains no layer: set prefix_trainable to "
                "embeddings, or train_model_mode to lora or full"
            )

    @property
    def has_hypernet(self) -> bool:
        """Whether a network writes the embeddings."""
        return self.hypernet is not None and self.hypernet.architecture != "identity"

    @property
    def attention(self) -> str | None:
        """`attn_implementation`, or what `use_flash_attention` says."""
        return "flash_attention_2" if self.use_flash_attention else self.attn_implementation


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters with a learning rate of their own."""

    pattern: str
    """Regular expression, searched in parameter names."""

    lr_scale: float = 1.0
    """Multiplies the learning rate."""

    def __post_init__(self) -> None:
        if self.lr_scale < 0:
            raise ConfigError(f"optimizer.param_groups: lr_scale must not be negative, got {self.lr_scale}")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its learning rate."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""

    learning_rate: float = 1e-5
    """Peak of the schedule."""

    weight_decay: float = 0.01
    """Decoupled decay; vectors (biases, norms) have none."""

    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""

    beta2: float = 0.95
    """Decay of the second moment, in [0, 1)."""

    epsilon: float = 1e-8
    """Added to the root of the second moment."""

    max_grad_norm: float = 1.0
    """A larger global gradient norm is scaled down to this. 0: no clipping."""

    lr_scheduler_type: LearningRateSchedule | None = None
    """Another name of schedule; where both are set they must agree."""

    schedule: LearningRateSchedule | None = None
    """Learning rate over the run. None: linear_warmup_cosine_decay. Every schedule begins with
    warmup_steps of linear warmup, except `constant`."""

    lr_min_ratio: float = 0.0
    """The rate ends at this share of its peak, in [0, 1]."""

    use_fused_adam: bool = True
    """Fused kernel where the device has one."""

    param_groups: tuple[ParamGroup, ...] = ()
    """List of {pattern, lr_scale}; the first pattern that matches a parameter holds."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        if self.epsilon <= 0:
            raise ConfigError(f"optimizer.epsilon must be positive, got {self.epsilon}")
        at_least("optimizer.max_grad_norm", self.max_grad_norm, 0)
        if not 0 <= self.lr_min_ratio <= 1:
            raise ConfigError(f"optimizer.lr_min_ratio must lie in [0, 1], got {self.lr_min_ratio}")
        if None not in (self.schedule, self.lr_scheduler_type) and self.schedule != self.lr_scheduler_type:
            raise ConfigError(
                f"optimizer.schedule is {self.schedule} but optimizer.lr_scheduler_type is "
                f"{self.lr_scheduler_type}: keep the one that is meant"
            )

    @property
    def lr_schedule(self) -> str:
        """The schedule, by whichever of its two names it was given."""
        return self.schedule or self.lr_scheduler_type or "linear_warmup_cosine_decay"
