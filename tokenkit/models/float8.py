"""Linear layers that multiply in float8, through torchao: converted in place, with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenkit.errors import ConfigError

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM

MULTIPLE = 16
"""Both sides of a matrix: what the products in float8 take."""
LEFT_OUT = ("lm_head", "query_proj")
"""The head, which the losses multiply, and the queries of experts, of which small errors choose others."""
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}


def use_float8(model: CausalLM, recipe: str) -> int:
    """Convert the linear layers of a model; return their number.

    Raises:
        ConfigError: no GPU that has it, no layer of a shape that it takes, or no torchao.
    """
    if not torch.cuda.is_available():
        raise ConfigError(f"float8 {recipe} needs a GPU, and there is none: set float8 to none")
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY[recipe]:
        wanted = ".".join(map(str, CAPABILITY[recipe]))
        raise ConfigError(
            f"float8 {recipe} needs a GPU of compute capability {wanted}, and "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}: set float8 to none"
        )
    fits = [name for name, module in model.causal_lm.named_modules() if is_converted(module, name)]
    if not fits:
        raise ConfigError(
            f"float8 {recipe} takes matrices whose sides are multiples of {MULTIPLE}, and no linear layer of "
            f"{type(model.causal_lm).__name__} has one: change the sizes, or set float8 to none"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"float8 {recipe} needs torchao, which is not installed ({error}): pip install torchao"
        ) from error
    options = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(model.causal_lm, config=options, module_filter_fn=is_converted)
    return len(fits)


def is_converted(module: Any, name: str) -> bool:
    """Whether a layer is one that float8 takes."""
    return (
        isinstance(module, nn.Linear)
        and name.rpartition(".")[2] not in LEFT_OUT
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    )
