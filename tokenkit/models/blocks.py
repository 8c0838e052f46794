"""How a model's layers are computed: which attention, Liger's kernels, torch.compile. No weight changes.

All of it is set once the model is whole, compared with itself and adapted, shortly before it is sharded.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config as functorch

from tokenkit.errors import ConfigError, nearest
from tokenkit.models.options import HUB_KERNELS, BodyOptions

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM

BACKEND = "inductor"
HEADS = ("cross_entropy", "fused_linear_cross_entropy")
"""What Liger would do to the head, which our losses multiply themselves."""


def prepare(model: CausalLM, options: BodyOptions, device: torch.device) -> None:
    """Give a model the kernels and the compiler that were asked for, in place.

    Args:
        model: on any device; adapters are in it already.
        options: what to use.
        device: where it will run.

    Raises:
        ConfigError: something asked for cannot run there, or not with this architecture.
    """
    check_attention(model, device)
    if options.use_liger_kernel:
        use_liger(model, device)
    if options.compile:
        compile_layers(model, device)


def check_attention(model: CausalLM, device: torch.device) -> None:
    """Refuse an attention that has no backward on `device`, or no kernel."""
    chosen = getattr(model.config, "_attn_implementation", None) or ""
    needs_gpu = "flash" in chosen or chosen.startswith(HUB_KERNELS) or chosen == "flex_attention"
    if needs_gpu and device.type == "cpu":
        raise ConfigError(
            f"attn_implementation {chosen} needs a GPU, and this run computes on a CPU: set it to sdpa "
            "or eager"
        )


def use_liger(model: CausalLM, device: torch.device) -> None:
    """Put Liger's RMSNorm, SwiGLU or GeGLU, and rotary embedding into a model, as Liger chooses them for it.

    Raises:
        ConfigError: no GPU, no liger-kernel, or an architecture that it does not know.
    """
    if device.type != "cuda":
        raise ConfigError(
            "use_liger_kernel needs a GPU: Liger's kernels are written in Triton, and this run computes on a "
            f"{device.type.upper()}; set it to false"
        )
    apply_liger(model.causal_lm)


def apply_liger(causal_lm: Any) -> None:
    """Do what `use_liger` does, wherever the model is.

    Liger also changes the module that holds the architecture's code, for all models of the process. That is
    taken back: its functions are given to this model's own modules alone.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    except ImportError as error:
        raise ConfigError(
            f"use_liger_kernel needs liger-kernel, which is not installed ({error}): pip install liger-kernel"
        ) from error
    kind = str(causal_lm.config.model_type)
    if kind not in KNOWN:
        raise ConfigError(
            f"use_liger_kernel: liger-kernel has nothing for {kind}{nearest(kind, KNOWN)}; set it to false"
        )
    home = vars(sys.modules[type(causal_lm).__module__])
    before, apply = dict(home), KNOWN[kind]
    without = {name: False for name in HEADS if name in inspect.signature(apply).parameters}
    try:
        apply(model=causal_lm, **without)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"use_liger_kernel: liger-kernel cannot change {type(causal_lm).__name__} ({error}); set it to "
            "false"
        ) from error
    finally:
        changed = {name: value for name, value in home.items() if before.get(name) is not value}
        home.update({name: before[name] for name in changed if name in before})
    functions = {name: value for name, value in changed.items() if not isinstance(value, type)}
    for module in causal_lm.modules():
        _give(module, home, functions)


def _give(module: Any, home: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> None:
    """Let a module's forward find `functions` where it looked for those of its file."""
    forward = inspect.unwrap(type(module).forward)
    if "forward" in vars(module) or getattr(forward, "__globals__", None) is not home:
        return
    if functions.keys() & set(forward.__code__.co_names):
        space = {**home, **functions}
        code, closure = forward.__code__, forward.__closure__
        own = FunctionType(code, space, forward.__name__, forward.__defaults__, closure)
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(own, module)


def compile_layers(model: CausalLM, device: torch.device) -> None:
    """Compile the forward of each layer; hooks and gradient checkpointing stay around it.

    Raises:
        ConfigError: a CPU without a compiler of C++.
    """
    if device.type == "cpu" and BACKEND == "inductor":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None and shutil.which("clang++") is None:
            raise ConfigError(
                f"compile needs a compiler of C++ on a CPU, and {compiler!r} is not installed: set it to "
                "false"
            )
    # a step may go backward through one graph for each loss: what the graph holds must outlive the first
    functorch.donated_buffer = False
    for layer in model.layers:
        layer.forward = _compiled(layer)


def _compiled(layer: Any) -> Callable[..., Any]:
    own = getattr(type(layer).forward, "__wrapped__", None)  # transformers wraps it in a checkpoint
    if own is None or not hasattr(layer, "gradient_checkpointing") or "forward" in vars(layer):
        compiled: Callable[..., Any] = torch.compile(layer.forward, backend=BACKEND)
        return compiled
    inside = torch.compile(MethodType(own, layer), backend=BACKEND)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(inside, **kwargs), *args)
        return inside(*args, **kwargs)

    return checkpointed
