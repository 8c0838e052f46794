"""What of a student moves: adapters (LoRA through PEFT), all of it, or its embeddings alone.

And the switch that makes one body serve as teacher and student.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from tokenkit.models.causal_lm import CausalLM, effective_weight
from tokenkit.models.options import LoraOptions


def make_trainable(
    student: CausalLM,
    mode: Literal["lora", "full", "none"],
    lora: LoraOptions,
    *,
    train_embeddings: bool,
    recomputes: bool,
) -> None:
    """Choose the parameters that move, in place; embeddings that do are float32.

    Args:
        student: with the rows that it ends with.
        mode: what of the body moves: adapters, all, nothing.
        lora: of the adapters.
        train_embeddings: of input, output and an expansion.
        recomputes: layers compute their activations again in the backward pass instead of storing them.

    Raises:
        ValueError: see `add_lora`.
    """
    if train_embeddings:
        norms = [module for module in student.modules() if isinstance(module, nn.LayerNorm)]
        # a CPU's layer norm refuses the float32 that comes from the embeddings if it is not itself
        vocabulary = (*student.vocabulary_modules, student.expansion)
        for module in (*norms, *(one for one in vocabulary if one is not None)):
            module.float()
    if mode == "lora":
        add_lora(student, lora)
    else:
        student.model.requires_grad_(mode == "full")
    if student.expansion is not None:
        student.expansion.requires_grad_(train_embeddings)
    if mode != "lora" or train_embeddings:  # else a head that adapters or modules_to_save name is trained
        for module in student.vocabulary_modules:  # adapters may have put others in their place
            effective_weight(module).requires_grad_(train_embeddings)
    if recomputes:
        student.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})


def add_lora(student: CausalLM, options: LoraOptions) -> None:
    """Put adapters into `student`, in place. Everything else in it is frozen.

    Raises:
        ValueError: a range that names no layer, a target that names no module, or one
            that names one use of a tied matrix: no merged model could be tied and have it.
    """
    from peft import LoraConfig, get_peft_model

    present = [f".{name}" for name, _ in student.causal_lm.named_modules()]
    for wanted in options.modules_to_save:  # peft itself passes over a name that it does not find
        if not any(name.endswith(f".{wanted}") for name in present):
            raise ValueError(f"model_lora_modules_to_save: this model has no module {wanted!r}")
    names = adapted_modules(student, options)
    whole = [name for name in options.modules_to_save if _is_vocabulary(student, name)]
    tied_saved = whole if student.is_tied else []
    vocabulary = (student.embedding, student.output)
    tied = [name for name in names if student.causal_lm.get_submodule(name) in vocabulary]
    if tied and student.is_tied:
        raise ValueError(
            f"model_lora_targets name {' and '.join(tied)}, but input and output embedding are one matrix: "
            "set output_embeddings_mode to untie, or leave them to train_embeddings"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=names,
        modules_to_save=[name for name in options.modules_to_save if name not in tied_saved] or None,
        fan_in_fan_out=type(student.causal_lm).__name__.startswith("GPT2"),  # its layers are transposed
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers about a name that peft uses
            student.model = get_peft_model(student.causal_lm, config)
    except ValueError as error:
        raise ValueError(f"no adapter could be placed (model_lora_*): {error}") from error
    if tied_saved:  # peft would give each use a copy of its own
        student.embedding.float()
        student.embedding.weight.requires_grad_(True)


def _is_vocabulary(student: CausalLM, wanted: str) -> bool:
    modules = student.causal_lm.named_modules()
    found = [module for name, module in modules if f".{name}".endswith(f".{wanted}")]
    return any(module in (student.embedding, student.output) for module in found)


def adapted_modules(student: CausalLM, options: LoraOptions) -> list[str]:
    """Return the full names of the modules that get an adapter.

    Raises:
        ValueError: there are none.
    """
    layers = parse_layers(options.layers, len(student.layers))
    layer_of = {id(m): i for i, layer in enumerate(student.layers) for m in layer.modules()}
    pattern = None if options.target_regex is None else re.compile(options.target_regex)

    def is_meant(name: str, module: nn.Module) -> bool:
        layer = layer_of.get(id(module))
        if layers is not None and layer is not None and layer not in layers:
            return False
        if pattern is not None:
            return pattern.fullmatch(name) is not None
        if options.targets:
            return any(name == target or name.endswith(f".{target}") for target in options.targets)
        return layer is not None and not isinstance(module, nn.Embedding)

    names = [
        name
        for name, module in student.causal_lm.named_modules()
        if (isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D")
        and is_meant(name, module)
    ]
    routers = [name for name in names if _is_router(student.causal_lm.get_submodule(name))]
    if routers and (pattern is not None or options.targets):
        raise ValueError(
            f"model_lora_target_regex or model_lora_targets name {routers[0]}, a router of experts, whose "
            "output is no matrix: no adapter can stand beside it; name the linear layers alone"
        )
    names = [name for name in names if name not in routers]
    if not names:
        raise ValueError(
            f"model_lora_targets={list(options.targets)}, model_lora_target_regex={options.target_regex!r} "
            f"and model_lora_layers={options.layers!r} name no linear layer of this model"
        )
    return names


def _is_router(module: nn.Module) -> bool:
    """Whether a linear layer gives something else than a matrix (PhiMoE, Llama 4: a choice of experts)."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    with torch.no_grad():
        return not isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)


def parse_layers(text: str | None, num_layers: int) -> list[int] | None:
    """Read "0-8" or "0-3,10" (ends included) as layer numbers.

    Raises:
        ValueError: not of that form, or beyond the model's last layer.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f"model_lora_layers must look like '0-8' or '0-3,10', got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= num_layers or first > last:
            raise ValueError(f"model_lora_layers {text!r}: the model's layers are 0 to {num_layers - 1}")
        layers += range(first, last + 1)
    return sorted(set(layers))


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Run `model` as it was before training: adapters off, dropout off.

    Only the adapters' switch is flipped. PEFT's own `disable_adapter` also clears `requires_grad`, from
    which FSDP2, if it sees that in its first forward, concludes that nothing is trained.
    """
    tuned: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    training = model.training
    for module in tuned:
        module._disable_adapters = True
    model.eval()
    try:
        yield
    finally:
        for module in tuned:
            module._disable_adapters = False
        model.train(training)
