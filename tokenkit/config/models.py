"""What is loaded, and what of it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenkit.embeddings.hypernet_options import HypernetOptions
from tokenkit.errors import ConfigError, at_least
from tokenkit.models.options import BodyOptions, Dtype, LoraOptions
from tokenkit.options import flat
from tokenkit.tokenization.spec import BYTE, parse_spec

PrefixTrainable = Literal["non_overlapping_embeddings", "embeddings", "all"]


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

    @property
    def new_model(self) -> Mapping[str, Any] | None:
        """The settings of a model that is not read but made; None: it is read."""
        return None


@dataclass(frozen=True, kw_only=True)
class StudentSource(ModelSource):
    """The model that is trained, and the tokenizer that it has."""

    from_config: Mapping[str, Any] | None = None
    """Begin with a new model, its weights drawn at random: `model_type` and the other settings that the
    config.json of that architecture has. pretrained_model_name_or_path is then only what it is called, and
    tokenizer_name must be set."""

    def __post_init__(self) -> None:
        if self.from_config is not None and self.tokenizer_name is None:
            raise ConfigError(
                "student.from_config makes a model that has no tokenizer: name one as student.tokenizer_name"
            )

    @property
    def new_model(self) -> Mapping[str, Any] | None:
        """`from_config`."""
        return self.from_config


@dataclass(frozen=True, kw_only=True)
class Target:
    """The tokenizer that the student ends with."""

    target_tokenizer_name: str | None = None
    """Spec, path or `byte`. None: the student keeps its tokenizer, and a teacher must be named."""

    tokens_to_add: tuple[str, ...] = ()
    """Tokens appended to the target tokenizer."""

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
class Products:
    """How matrix products may be rounded, to be faster."""

    tf32: bool = False
    """Let GPUs round the inputs of float32 matrix products to 10 bits of fraction, which is faster."""

    float8: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = "none"
    """Multiply in float8 what linear layers of the body multiply, by a recipe of torchao, which must be
    installed. Needs dtype bfloat16 and a GPU of compute capability 8.9 (row by row 9.0)."""


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

    loss_workspace_mib: int | None = None
    """Memory that a loss may use for logits, beside its results, MiB. More is faster up to a point. None: a
    sixteenth of the GPU's memory, 8 GiB at most; 256 on a CPU."""

    body: BodyOptions = flat(BodyOptions)
    lora: LoraOptions = flat(LoraOptions)
    hypernet: HypernetOptions | None = None
    """A network that is trained between the embeddings and the student; None, or identity: there is none."""

    prefix: Prefix = flat(Prefix)
    products: Products = flat(Products)

    def __post_init__(self) -> None:
        if self.dtype == "float32" and self.body.computes_in_16_bits:
            raise ConfigError(
                f"attn_implementation {self.body.attention} computes in 16 bits, and dtype is float32: set "
                "dtype to bfloat16, or attn_implementation to sdpa"
            )
        if self.products.float8 != "none" and (self.dtype != "bfloat16" or self.train_model_mode != "full"):
            raise ConfigError(
                f"float8 ({self.products.float8}) needs dtype bfloat16 and train_model_mode full, got "
                f"{self.dtype} and {self.train_model_mode}: set those, or float8 to none"
            )
        if self.loss_workspace_mib is not None:
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
        return self.body.attention
