"""Any Hugging Face causal language model as embedding + body + head; its logits are never formed.

    ids -> embedding -> body -> hidden states, beside the head that would have multiplied them

The body can be run with another `Vocabulary` than its own: that is how one copy of the weights serves
as teacher (old tokenizer) and student (new tokenizer).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenkit.models.check import HeadForm, guess_form, settle
from tokenkit.models.collect import collecting, qkv_widths
from tokenkit.models.expansion import InputExpansion
from tokenkit.models.options import Dtype
from tokenkit.models.reading import EXPANDED, read_model
from tokenkit.structs import Head, HiddenStates, StateKind, Widths

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a pretrained model is read."""

    revision: str | None = None
    dtype: torch.dtype | Literal["auto"] = torch.float32
    """"auto": as the weights are stored."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    for_use: bool = False
    """It is neither trained nor moved nor teaches: a byte model with input-id expansion may be read too."""


class Rows(Protocol):
    """What a body needs of a vocabulary."""

    @property
    def embedding(self) -> Callable[[Tensor], Tensor]:
        """From ids to input embeddings."""

    def per_layer(self, ids_BT: Tensor) -> Tensor | None:
        """Return what each layer gets for these ids, [B, T, layers, width]; None: nothing."""

    def head(self) -> Head:
        """Return the head as the kernels take it."""


class Vocabulary(nn.Module):
    """The matrices that a tokenizer's ids index, detached from any body."""

    table: LayerTable | None
    """Of a model in which every layer has rows of its own."""

    def __init__(
        self,
        embedding: nn.Module,
        output: nn.Module,
        head: Mapping[str, Any],
        table: LayerTable | None = None,
    ):
        super().__init__()
        self.embedding = embedding
        self.output = output
        self.table = table
        self._head = dict(head)

    def per_layer(self, ids_BT: Tensor) -> Tensor | None:
        """Return what each layer gets for these ids."""
        return None if self.table is None else self.table(ids_BT)

    def head(self) -> Head:
        """Return the head as the kernels take it."""
        return Head(weight_VD=effective_weight(self.output), bias_V=head_bias(self.output), **self._head)


class LayerTable(nn.Module):
    """An embedding with rows for every layer in one (Gemma 3n, Gemma 4), read as those bodies read it."""

    def __init__(self, embedding: nn.Module, layers: int):
        super().__init__()
        self.embedding, self.layers = embedding, layers

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return [B, T, layers, width]; ids without a row (of images, of sound) take that of id 0."""
        known_BT = torch.where(ids_BT < effective_weight(self.embedding).shape[0], ids_BT, 0)
        return self.embedding(known_BT).unflatten(-1, (self.layers, -1))


class OwnVocabulary:
    """A model's own embedding and head as they are now. Made anew in each forward, and used in it.

    Args:
        model: the model.
        written: what its projector writes; None: its parameters.
    """

    def __init__(self, model: CausalLM, written: Sequence[Tensor] | None):
        self._model, self._written = model, written

    def embedding(self, ids_BT: Tensor) -> Tensor:
        """Return the input embeddings, expanded where the model has an expansion."""
        model = self._model
        if self._written is None:
            embedded_BTD: Tensor = model.embedding(ids_BT)
        else:  # through the module: some scale what they embed
            embedded_BTD = functional_call(model.embedding, {"weight": self._written[0]}, (ids_BT,))
        return embedded_BTD if model.expansion is None else embedded_BTD + model.expansion(ids_BT)

    def per_layer(self, ids_BT: Tensor) -> Tensor | None:
        """Return what each layer gets for these ids."""
        table = self._model.layer_table
        return None if table is None else LayerTable(table, self._model.config.num_hidden_layers)(ids_BT)

    def head(self) -> Head:
        """Return the head as the kernels take it; padding rows are marked, LoRA on the head is applied."""
        model = self._model
        weight_VD = effective_weight(model.output) if self._written is None else self._written[-1]
        return Head(weight_VD=weight_VD, bias_V=head_bias(model.output), **model.head_options())


class CausalLM(nn.Module):
    """A Hugging Face model that returns `HiddenStates`.

    Args:
        model: a `...ForCausalLM`; it keeps its parameter names, so its state dict stays its own.
        vocab_size: number of real tokens; rows of the head beyond it are padding.
    """

    expansion: InputExpansion | None
    """What a byte model adds to its own embeddings; never used with another `Vocabulary`."""
    projector: nn.Module | None
    """Takes the model's own matrices and returns those that it uses; never used with another `Vocabulary`."""
    form: HeadForm
    """How logits follow from hidden states: guessed, and measured where the model is loaded."""

    def __init__(self, model: Any, vocab_size: int):
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.form = guess_form(self.causal_lm.config)
        self.expansion = None
        self.projector = None
        rows = self.embedding.weight.shape[0]
        if vocab_size > rows:
            raise ValueError(
                f"the tokenizer has {vocab_size} ids but the model's embedding only {rows} rows: "
                "this is not the tokenizer that the model was trained with; set tokenizer_name to its own"
            )

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model itself, out of PEFT's wrapper where there is one."""
        unwrap = getattr(self.model, "get_base_model", None)
        return unwrap() if unwrap is not None else self.model

    @property
    def body(self) -> nn.Module:
        """Everything between the embedding and the head."""
        model = self.causal_lm
        if (body := model.base_model) is not model:
            return body
        # Llama 4's class names a prefix under which it has nothing
        holds = (child for child in model.children() if any(m is self.embedding for m in child.modules()))
        return next(holds, model)

    @property
    def embedding(self) -> Any:
        """The input embedding module."""
        return self.causal_lm.get_input_embeddings()

    @property
    def output(self) -> Any:
        """The module whose weight is the head."""
        return self.causal_lm.get_output_embeddings()

    @property
    def layer_table(self) -> Any:
        """The embedding with rows for every layer, which the ids index too; None where there is none."""
        return getattr(self.body, "embed_tokens_per_layer", None)

    @property
    def vocabulary_modules(self) -> list[Any]:
        """The modules that ids index: embedding, head, and the table of all layers where there is one."""
        return [m for m in (self.embedding, self.output, self.layer_table) if m is not None]

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.causal_lm.config

    @property
    def is_tied(self) -> bool:
        """Whether input and output embedding are one parameter."""
        return effective_weight(self.output) is effective_weight(self.embedding)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers: the body's module list with the most parameters."""
        lists = [module for module in self.body.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise ValueError(f"{type(self.causal_lm).__name__} has no list of layers: it cannot be sharded")
        return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))

    def vocabulary(self) -> Vocabulary:
        """Return a frozen copy of this model's embedding and head, still tied where they are tied."""
        embedding, output, table = copy.deepcopy((self.embedding, self.output, self.layer_table))
        layers = None if table is None else LayerTable(table, self.config.num_hidden_layers)
        return Vocabulary(embedding, output, self.head_options(), layers).requires_grad_(False)

    def own(self) -> OwnVocabulary:
        """Return this model's own embedding and head, to be used in one forward."""
        return OwnVocabulary(self, None if self.projector is None else self.projector(self.matrices()))

    def held_head(self) -> Head:
        """Return the head as its parameters are, without what a projector makes of the whole vocabulary."""
        return OwnVocabulary(self, None).head()

    def head(self) -> Head:
        """Return the head of `own()`."""
        return self.own().head()

    def matrices(self) -> list[Tensor]:
        """Return the matrices that are trained: input embedding, and head where it is not tied."""
        weights = [effective_weight(self.embedding), effective_weight(self.output)]
        return weights[:1] if self.is_tied else weights

    def widths(self, vocabulary: Vocabulary | None = None) -> Widths:
        """Return the sizes that trained parts of losses depend on, under `vocabulary` or the model's own."""
        source = self if vocabulary is None else vocabulary
        return Widths(
            hidden=effective_weight(source.output).shape[1],
            embedding=effective_weight(source.embedding).shape[1],
            layers=len(self.layers),
            qkv=qkv_widths(list(self.layers), self.config),
        )

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Return the input embeddings of `own()`."""
        return self.own().embedding(ids_BT)

    def forward(
        self,
        ids_BT: Tensor,
        vocabulary: Rows | None = None,
        collect: frozenset[StateKind] = frozenset(),
        position_BT: Tensor | None = None,
    ) -> HiddenStates:
        """Run the body on right-padded ids.

        No attention mask is passed: under a causal mask, padding on the right reaches no real token.

        Args:
            ids_BT: int64 token ids of `vocabulary`, or of the model's own when it is None.
            vocabulary: embedding and head to use instead of the model's own.
            collect: what to return beside the last hidden states.
            position_BT: int64, of rows that hold several documents: it begins anew in each, and a token
                attends to its own document alone (`check.check_packing` says whether that holds).

        Raises:
            ValueError: "qkv" of an architecture whose projections are not known.
        """
        source = self.own() if vocabulary is None else vocabulary
        embedded_BTD = source.embedding(ids_BT)
        with collecting(self.layers if collect else (), collect, self.config) as found:
            hidden_BTD = self.run_body(source, ids_BT, embedded_BTD, position_BT)
        if self.form.transform is not None:
            hidden_BTD = self.causal_lm.get_submodule(self.form.transform)(hidden_BTD)
        return HiddenStates(
            hidden_BTD,
            source.head(),
            embedded_BTD=embedded_BTD if "embedded" in collect else None,
            layers_BTD=(*found.layers_BTD[:-1], hidden_BTD) if "layers" in collect else (),
            qkv=tuple((parts[0], parts[1], parts[2]) for parts in found.qkv),
        )

    def before_transform(self, ids_BT: Tensor) -> HiddenStates:
        """Return the body's own hidden states, before the form's transform, beside the head."""
        own = self.own()
        return HiddenStates(self.run_body(own, ids_BT, own.embedding(ids_BT)), own.head())

    def run_body(
        self, source: Rows, ids_BT: Tensor, embedded_BTD: Tensor, position_BT: Tensor | None = None
    ) -> Tensor:
        """Return the body's last hidden states for ids of `source` and their embeddings."""
        rows_BTLP = source.per_layer(ids_BT)
        more = {} if rows_BTLP is None else {"per_layer_inputs": rows_BTLP}
        if position_BT is not None:
            more["position_ids"] = position_BT
        if self.form.embedding_scale != 1:
            embedded_BTD = self.form.embedding_scale * embedded_BTD
        hidden_BTD: Tensor = self.body(inputs_embeds=embedded_BTD, use_cache=False, **more).last_hidden_state
        return hidden_BTD

    def replace_vocabulary(
        self,
        embedding_VD: Tensor,
        output_VD: Tensor | None,
        bias_V: Tensor | None,
        vocab_size: int,
        table_VE: Tensor | None = None,
    ) -> None:
        """Give the model other embedding rows, in place.

        Args:
            embedding_VD: new input embedding, padding rows included.
            output_VD: new head; None ties it to the input embedding.
            bias_V: new bias of the head, for a model whose head has one.
            vocab_size: real tokens; the rows from there on are padding.
            table_VE: new rows of all layers, for a model that has such a table.
        """
        config, embedding, output = self.causal_lm.config, self.embedding, self.output
        self._put(embedding, "weight", embedding_VD)
        embedding.num_embeddings, embedding.padding_idx = embedding_VD.shape[0], None
        output.weight = embedding.weight if output_VD is None else nn.Parameter(output_VD)
        output.out_features = embedding_VD.shape[0]
        if bias_V is not None:
            self._put(output, "bias", bias_V)
        config.vocab_size = embedding_VD.shape[0]
        config.tie_word_embeddings = output_VD is None
        if table_VE is not None:
            self._put(self.layer_table, "weight", table_VE)
            self.layer_table.num_embeddings, self.layer_table.padding_idx = table_VE.shape[0], None
            config.vocab_size_per_layer_input = table_VE.shape[0]
        if hasattr(config, "unpadded_vocab_size"):  # Inkling cuts its logits there
            config.unpadded_vocab_size = embedding_VD.shape[0]
        self.vocab_size = vocab_size

    def _put(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        """Let a parameter be new rows, under every name that the model has for it."""
        old, new = getattr(owner, name), nn.Parameter(rows)
        for module in self.causal_lm.modules():
            for key, parameter in module._parameters.items():
                if parameter is old:
                    setattr(module, key, new)

    def head_options(self) -> dict[str, Any]:
        """Return what a `Head` of this model has beside weight and bias."""
        return {"softcap": self.form.softcap, "scale": self.form.scale, "vocab_size": self.vocab_size}


def effective_weight(module: Any) -> Tensor:
    """Return the weight that multiplies, with PEFT's wrappers applied.

    A head whose plain `.weight` is read would silently lose its LoRA delta.
    """
    saved = getattr(module, "modules_to_save", None)
    if saved is not None and not getattr(module, "_disable_adapters", False):
        return saved[_active(module)].weight
    if hasattr(module, "original_module"):
        return module.original_module.weight
    if not hasattr(module, "base_layer"):
        return module.weight
    weight = module.base_layer.weight
    if getattr(module, "_disable_adapters", False) or getattr(module, "merged", False):
        return weight
    for adapter in module.active_adapters:
        weight = weight + module.get_delta_weight(adapter)
    return weight


def head_bias(module: Any) -> Tensor | None:
    """Return the bias of a head, out of PEFT's wrapper where there is one."""
    return getattr(getattr(module, "base_layer", module), "bias", None)


def _active(module: Any) -> str:
    active = module.active_adapter
    return active[0] if isinstance(active, list) else active


def load_causal_lm(name_or_path: str, vocab_size: int, options: LoadOptions) -> CausalLM:
    """Load a pretrained model from a folder or, by name, from the hub, and compare it with itself.

    Only safetensors are read; code from the repository runs only with `trust_remote_code`. Of a model of
    images and text the text part alone is read.

    Raises:
        FileNotFoundError: `name_or_path` looks like a folder and is none, or lacks files.
        ValueError: no causal model that can be read, one whose weights are missing, quantised or not
            finite, or one whose logits are not those of its hidden states and head.
    """
    loaded = CausalLM(read_model(name_or_path, options), vocab_size)
    if str(loaded.config.model_type).startswith(EXPANDED):
        max_bytes = loaded.config.expansion_max_bytes
        loaded.expansion = InputExpansion.of_exported(loaded.model.expansion, max_bytes)
    settle(loaded, name_or_path)
    return loaded
