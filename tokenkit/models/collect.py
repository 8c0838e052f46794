"""What a model computes on the way: layers' outputs, and queries, keys and values, caught by hooks.

The hooks live for one forward. A submodule of a layer that FSDP2 shards sees whole tensors; under gradient
checkpointing what is caught in the first run carries the gradient, and the second run catches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

SEPARATE = ("q_proj", "k_proj", "v_proj")  # Llama, Qwen, Gemma, Mistral
FUSED = ("qkv_proj", "c_attn")  # Phi-3; GPT-2


@dataclass
class Collected:
    """What one forward gave."""

    layers_BTD: list[Tensor] = field(default_factory=list)
    qkv: list[dict[int, Tensor]] = field(default_factory=list)
    """Of each layer queries, keys and values, by place."""


def projections(layer: nn.Module) -> list[nn.Module] | None:
    """Return the modules that make queries, keys and values, one if it makes all; None: not known."""
    by_name = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    if all(name in by_name for name in SEPARATE):
        return [by_name[name] for name in SEPARATE]
    return next(([by_name[name]] for name in FUSED if name in by_name), None)


def qkv_widths(layers: Sequence[nn.Module], config: Any) -> tuple[int, int, int] | None:
    """Return how wide queries, keys and values are; None: not known, or not the same in all layers."""
    found = {_widths_of(layer, config) for layer in layers}
    return found.pop() if len(found) == 1 else None


def _widths_of(layer: nn.Module, config: Any) -> tuple[int, int, int] | None:
    parts = projections(layer)
    if parts is None:
        return None
    if len(parts) == 1:
        return _fused_widths(config)
    linear: list[Any] = [getattr(part, "base_layer", part) for part in parts]
    return linear[0].out_features, linear[1].out_features, linear[2].out_features


def _fused_widths(config: Any) -> tuple[int, int, int]:
    """Return how the output of one projection is cut, from a Hugging Face configuration."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads * head_dim, key_heads * head_dim, key_heads * head_dim


@contextmanager
def collecting(layers: Iterable[nn.Module], kinds: frozenset[str], config: Any) -> Iterator[Collected]:
    """Collect during one forward.

    Args:
        layers: the transformer layers.
        kinds: "layers", "qkv".
        config: the model's Hugging Face configuration.

    Raises:
        ValueError: "qkv" of an architecture whose projections are not known.
    """
    found = Collected()
    handles = []
    for layer in layers:
        if "layers" in kinds:
            handles.append(layer.register_forward_hook(_keep_output(found.layers_BTD)))
        if "qkv" in kinds:
            parts = projections(layer)
            if parts is None:
                raise ValueError(
                    f"no queries, keys and values can be collected from {type(layer).__name__}: expected "
                    f"modules {', '.join(SEPARATE)} or one of {', '.join(FUSED)}; align hidden states instead"
                )
            found.qkv.append({})
            for place, module in enumerate(parts):
                keep = _keep_part(found.qkv[-1], place, None if len(parts) == 3 else _fused_widths(config))
                handles.append(module.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep_output(into: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)

    return hook


def _keep_part(into: dict[int, Tensor], place: int, widths: tuple[int, int, int] | None) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        into.update(enumerate(output.split(widths, -1)) if widths else [(place, output)])

    return hook
