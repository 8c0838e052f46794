"""Hidden states and head of a model that another trainer has wrapped.

    states = hidden_states(model, batch.student)     # model: plain, DDP, compiled, FSDP2, PEFT, ...

The model is called as its trainer calls it, so that autocast, compilation, gradient hooks and adapters act,
and asked for its hidden states and for the logits of one position, by which the head is checked once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from tokenkit.models.causal_lm import CausalLM, OwnVocabulary, Rows, effective_weight, head_bias
from tokenkit.models.check import ROWS, HeadForm, settle
from tokenkit.models.collect import collecting
from tokenkit.structs import Head, HiddenStates, Side, StateKind

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
}
"""By class: where the wrapped model is."""
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 2e-2
"""Of logits, relative to the largest: float32, and what was rounded to 16 bits."""

_CHECKED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_FORMS: WeakKeyDictionary[nn.Module, HeadForm] = WeakKeyDictionary()


def hidden_states(
    model: nn.Module,
    input_ids: Tensor | Side,
    *,
    vocab_size: int | None = None,
    collect: Iterable[StateKind] = (),
    **inputs: Any,
) -> HiddenStates:
    """Run a Hugging Face model, whatever wraps it, up to its head.

    In the first call for a model its own logits at the last position are compared with those of the
    returned head: what multiplies them besides, and is not known here, is refused.

    Args:
        model: a `...ForCausalLM`, plain or inside `torch.compile`, DDP, FSDP2, PEFT, Accelerate or DeepSpeed
            up to stage 2.
        input_ids: int64 [B, T], padded on the right; or one side of a `Batch`, whose tokenizer then says
            `vocab_size`.
        vocab_size: number of the tokenizer's ids, where the head has more rows: those take no probability.
            None: every row of the head is a token.
        collect: what to return beside the last hidden states: "embedded", "layers", "qkv".
        inputs: more for the model's forward, such as `attention_mask` where padding is on the left.

    Returns:
        hidden_BTD [B, T, D] in the model's dtype, as the head multiplies it, and that head with its bias,
        scale and softcap. For a teacher call it under `torch.no_grad()`.

    Raises:
        TypeError: `model` is no causal language model, or `input_ids` neither a tensor nor a `Side`.
        ValueError: a head or a way of dividing it that is not known, or ids that the model has no rows for.
    """
    inner = unwrapped(model)
    rows = inner.get_input_embeddings().weight.shape[0]
    if isinstance(input_ids, Side):
        if vocab_size is None and input_ids.space_V is not None:
            vocab_size = len(input_ids.space_V)
        input_ids = input_ids.ids_BT
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        what = (
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        raise TypeError(
            "input_ids must be an int64 tensor [B, T] or one side of a Batch (batch.student, batch.teacher): "
            f"got {what}"
        )
    is_known = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    fits = vocab_size is None or vocab_size <= rows  # else it is said below which tokenizer is meant
    if is_known and fits and input_ids.numel():  # a GPU would have to be waited for
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= rows:
            raise ValueError(
                f"input_ids must be from 0 to {rows - 1}, the rows of the model's embedding: got "
                f"{low if low < 0 else high}; they are of another tokenizer, or marked as labels are"
            )
    return Wrapped(model, rows if vocab_size is None else vocab_size)(
        input_ids, None, frozenset(collect), **inputs
    )


def unwrapped(model: nn.Module) -> Any:
    """Return the model inside its wrappers; adapters stay.

    Raises:
        ValueError: FSDP's first version, which leaves no matrix that a loss could multiply.
        TypeError: no language model.
    """
    while True:
        name = type(model).__name__
        if name == "FullyShardedDataParallel":
            raise ValueError(
                "FSDP's first version flattens the head away: use fsdp_version 2 (torch's fully_shard)"
            )
        if name not in WRAPPERS:
            break
        model = getattr(model, WRAPPERS[name])
    if getattr(model, "get_output_embeddings", None) is None:
        raise TypeError(f"expected a Hugging Face causal language model: got {type(model).__name__}")
    return model


class Wrapped(CausalLM):
    """A `CausalLM` whose forward is that of the trainer's wrapper.

    Args:
        model: the wrapper, or a plain model.
        vocab_size: number of real tokens.
    """

    def __init__(self, model: nn.Module, vocab_size: int):
        super().__init__(unwrapped(model), vocab_size)
        self._outer = [model]  # in a list: its parameters are those of `self.model` already
        self._measure_form()

    def _measure_form(self) -> None:
        """Find out how the logits follow from the hidden states, once for each model that is still whole.

        What is divided (FSDP2, DeepSpeed) or computes in another type than it holds (quantised, or with a
        forward that Accelerate has put on it) cannot be measured so: there the configuration's word is
        taken, and `_check_once` has the last.
        """
        model = self.causal_lm
        parts = list(model.parameters())
        if (
            torch.compiler.is_compiling()
            or hasattr(model, "_original_forward")
            or getattr(model, "is_quantized", False)
            or any(isinstance(part, DTensor) or hasattr(part, "ds_id") or part.is_meta for part in parts)
        ):
            return
        if model not in _FORMS:
            is_training = {module: module.training for module in self.modules()}
            self.eval()
            try:
                with torch.autocast(parts[0].device.type, enabled=False):
                    settle(self, "the student")
            finally:
                for module, was_training in is_training.items():
                    module.training = was_training
            _FORMS[model] = self.form
        self.form = _FORMS[model]

    def run_body(
        self, source: Rows, ids_BT: Tensor, embedded_BTD: Tensor, position_BT: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states as the model itself hands them out, from ids."""
        how = {"use_cache": False, "output_hidden_states": True, "return_dict": True}
        outputs = self.causal_lm(input_ids=ids_BT, position_ids=position_BT, **how)
        states: Tensor = outputs.hidden_states[-1]
        return states

    @contextmanager
    def through(self, model: nn.Module) -> Iterator[None]:
        """Call `model`, a wrapper of the same model, in this context."""
        before, self._outer = self._outer, [model]
        try:
            yield
        finally:
            self._outer = before

    def own(self) -> OwnVocabulary:
        """Return the embedding and the head, put together where FSDP2 has divided them."""
        weights = [effective_weight(self.embedding), effective_weight(self.output)]
        if not any(isinstance(weight, DTensor) for weight in weights):
            return OwnVocabulary(self, None)
        return OwnVocabulary(self, [whole(weight) for weight in weights])

    def head(self) -> Head:
        """Return the head; the embedding beside it is left alone."""
        bias_V = head_bias(self.output)
        return Head(
            whole(effective_weight(self.output)),
            None if bias_V is None else whole(bias_V),
            **self.head_options(),
        )

    def forward(
        self,
        ids_BT: Tensor,
        vocabulary: Rows | None = None,
        collect: frozenset[StateKind] = frozenset(),
        position_BT: Tensor | None = None,
        **inputs: Any,
    ) -> HiddenStates:
        """Run the wrapper; see `CausalLM.forward`. Only the model's own vocabulary can be used."""
        if position_BT is not None:
            inputs["position_ids"] = position_BT
        assert vocabulary is None or isinstance(vocabulary, OwnVocabulary), "a wrapper reads ids"
        # of the class: trainers put a forward of their own on the model
        if "logits_to_keep" in inspect.signature(type(self.causal_lm).forward).parameters:
            inputs["logits_to_keep"] = 1  # none would do, but 0 means all
        embedded: list[Tensor] = []
        handle = None
        if "embedded" in collect:
            handle = self.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
        try:
            with collecting(self.layers if "qkv" in collect else (), collect & {"qkv"}, self.config) as found:
                outputs = self._outer[0](
                    input_ids=ids_BT, use_cache=False, output_hidden_states=True, return_dict=True, **inputs
                )
        finally:
            if handle is not None:
                handle.remove()
        states = getattr(outputs, "hidden_states", None)
        if not states:
            raise ValueError(
                f"{type(self.causal_lm).__name__} returns no hidden states: it cannot be trained here"
            )
        if len(embedded) != ("embedded" in collect) or ("qkv" in collect and not all(found.qkv)):
            raise ValueError(
                "a compiled model shows neither its embeddings nor its queries, keys and values: leave "
                "torch.compile away, or the losses that read them (baseline_dskd, alm_latents with qkv)"
            )
        head, last_BTD = self.head(), states[-1]
        if self.form.transform is not None:
            last_BTD = self.causal_lm.get_submodule(self.form.transform)(last_BTD)
        _check_once(self.causal_lm, last_BTD, head, outputs.logits)
        return HiddenStates(
            last_BTD,
            head,
            embedded_BTD=embedded[0] if embedded else None,
            layers_BTD=(*states[1:-1], last_BTD) if "layers" in collect else (),
            qkv=tuple((parts[0], parts[1], parts[2]) for parts in found.qkv),
        )


def whole(weight: Tensor, *, averaged: bool = True) -> Tensor:
    """Return a parameter as one tensor on every process.

    What FSDP2 has divided is gathered; gradients are scattered back.

    Args:
        weight: a parameter, or what was made of one.
        averaged: gradients are averaged over processes, as FSDP2 does by itself; False: summed.
    """
    if getattr(weight, "ds_id", None) is not None and not weight.numel():
        raise ValueError(
            "DeepSpeed's stage 3 leaves no head that a loss could multiply: use stage 2, or FSDP2"
        )
    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    if "tp" in names or sum(isinstance(place, Shard) for place in weight.placements) > 1:
        raise ValueError(
            "a head divided by tensor parallelism is not put together here: leave it whole, or give the "
            "losses a Head with its Shard"
        )
    gathered = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad and averaged:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered


@torch.no_grad()
def _check_once(model: nn.Module, hidden_BTD: Tensor, head: Head, logits_BTV: Tensor | None) -> None:
    """Compare the model's own logits of the last position with those of the head.

    Raises:
        ValueError: they differ.
    """
    if model in _CHECKED or torch.compiler.is_compiling():
        return
    if logits_BTV is None:
        raise ValueError(f"{type(model).__name__} returns no logits to compare its head with")
    own_BV = logits_BTV[:, -1].float()
    last_BD = hidden_BTD[:, -1].float()
    parts = head.weight_VD.split(ROWS)  # a float32 copy of a whole head may be gigabytes
    made_BV = torch.cat([last_BD @ part.float().T for part in parts], 1) * head.scale
    if head.bias_V is not None:
        made_BV += head.bias_V.float() * head.scale
    if head.softcap is not None:
        made_BV = head.softcap * torch.tanh(made_BV / head.softcap)
    # rounded to 16 bits: by the model's type, or by an autocast whose outputs were made float32 again
    is_rounded = any(torch.equal(own_BV.to(t).float(), own_BV) for t in (torch.bfloat16, torch.float16))
    difference = (own_BV - made_BV).abs().max() / own_BV.abs().max().clamp_min(1e-6)
    if not difference <= (ROUNDED_TOLERANCE if is_rounded else TOLERANCE):
        raise ValueError(
            f"{type(model).__name__} makes logits that are not those of its hidden states and head: they "
            f"differ by {difference:.2g} of the largest; a loss would train on another objective, so this "
            "model is refused"
        )
    _CHECKED[model] = True
