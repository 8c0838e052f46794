"""Compute in 16 bits from float32 weights in one process, as FSDP2's mixed precision does in several.

    forward of a group:   every weight is cast once, floating-point inputs of a layer too; the residual
                          stream is of 16 bits from the embedding on
    backward:             the gradient of each use is of 16 bits, and is added up in float32, in `.grad`

A group is a layer, or all that lies in no layer. Checkpointed layers cast again when they are computed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

KEPT = "ExpertTables"
"""Tables whose rows are looked up, and cast then: a cast of all would be the step's largest work."""


def compute_in(module: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Let `module` compute in `dtype` from now on; its parameters stay as they are.

    Args:
        module: the root. Outside its forward it shows its parameters, inside what they were cast to: a weight
            that is read before would be of the wrong type.
        layers: submodules that cast their own, and their inputs, whenever they are called.
        dtype: of 16 bits; what has it already is not copied.
    """
    layers = list(layers)
    for layer in layers:
        cast = _Cast(layer, set(), dtype)
        cast.hook(casts_inputs=True)
        cast.hook_checkpoints()
    inside = {id(part) for layer in layers for part in layer.modules()}
    _Cast(module, inside, dtype).hook(casts_inputs=False)


class _Cast:
    """Puts cast weights in the place of parameters while a module's forward runs."""

    def __init__(self, module: nn.Module, left_out: set[int], dtype: torch.dtype):
        self.module, self.dtype = module, dtype
        self.parts = [
            part
            for part in module.modules()
            if id(part) not in left_out and part._parameters and type(part).__name__ != KEPT
        ]
        self.kept: list[tuple[dict[str, Any], str, nn.Parameter]] = []

    def hook(self, *, casts_inputs: bool) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.put()
            return tree_map(self.cast, (args, kwargs)) if casts_inputs else None

        def after(*_: Any) -> None:
            self.take_back()

        self.module.register_forward_pre_hook(before, with_kwargs=True)
        self.module.register_forward_hook(after, always_call=True)

    def hook_checkpoints(self) -> None:
        """Cast again where a forward is computed again: transformers checkpoints it inside the hooks."""
        parts: Iterable[Any] = self.module.modules()
        for part in parts:
            if (checkpoint := getattr(part, "_gradient_checkpointing_func", None)) is not None:
                part._gradient_checkpointing_func = partial(
                    checkpoint, context_fn=lambda: (nullcontext(), self)
                )

    def __enter__(self) -> None:
        self.put()

    def __exit__(self, *_: object) -> None:
        self.take_back()

    def put(self) -> None:
        done: dict[int, Tensor] = {}  # a tied matrix is cast once: its gradients meet in 16 bits, as in FSDP2
        for part in self.parts:
            for name, parameter in part._parameters.items():
                if parameter is None or not parameter.is_floating_point() or parameter.dtype == self.dtype:
                    continue
                self.kept.append((part._parameters, name, parameter))
                if id(parameter) not in done:
                    done[id(parameter)] = self.cast(parameter)
                part._parameters[name] = done[id(parameter)]  # type: ignore[assignment]

    def take_back(self) -> None:
        for parameters, name, parameter in self.kept:
            parameters[name] = parameter
        self.kept.clear()

    def cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
