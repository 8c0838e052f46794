"""Distillation inside other trainers. Each trainer's package is imported with its own module only.

    from tokenkit.integrations import hidden_states, Distiller          # any loop
    from tokenkit.integrations import DistillationTrainer               # transformers
    from tokenkit.integrations import DistillationSFTTrainer            # TRL; DistillationGOLDTrainer
    from tokenkit.integrations import DistillationModule                # Lightning
    from tokenkit.integrations import accelerate_step                   # Accelerate

docs/integrations.md has an example of each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenkit.integrations.accelerate import accelerate_step
    from tokenkit.integrations.distiller import Distiller, FlatCollator
    from tokenkit.integrations.forward import hidden_states, unwrapped
    from tokenkit.integrations.lightning import DistillationModule
    from tokenkit.integrations.trainer import DistillationTrainer
    from tokenkit.integrations.trl import DistillationGOLDTrainer, DistillationSFTTrainer

PLACES = {
    "hidden_states": "forward",
    "unwrapped": "forward",
    "Distiller": "distiller",
    "FlatCollator": "distiller",
    "DistillationTrainer": "trainer",
    "DistillationModule": "lightning",
    "accelerate_step": "accelerate",
    "DistillationSFTTrainer": "trl",
    "DistillationGOLDTrainer": "trl",
}
"""In which module each name is."""

__all__ = [
    "DistillationGOLDTrainer",
    "DistillationModule",
    "DistillationSFTTrainer",
    "DistillationTrainer",
    "Distiller",
    "FlatCollator",
    "accelerate_step",
    "hidden_states",
    "unwrapped",
]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"tokenkit.integrations has no {name!r}: it has {', '.join(sorted(PLACES))}")
    return getattr(importlib.import_module(f"tokenkit.integrations.{PLACES[name]}"), name)
