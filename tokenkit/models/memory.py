"""What training a model takes of memory, from its shapes alone: a model on the meta device is enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOMENTS = {"adamw": 2}
"""Numbers that an optimizer keeps of each number that is trained."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process that holds a whole model; activations depend on the batch and are not here."""

    weights: int
    """float32: what is trained stays so whatever computes."""
    gradients: int
    """float32."""
    optimizer: int
    tables: int
    """Of `weights`, those of experts."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def memory(model: Any, optimizer: str) -> Memory:
    """Return what the training of all parameters of a model takes.

    Args:
        model: any module, also on the meta device; shared parameters count once.
        optimizer: its name.
    """
    weights = sum(4 * p.numel() for p in model.parameters())
    tables = sum(4 * p.numel() for name, p in model.named_parameters() if is_table(name))
    return Memory(weights, weights, MOMENTS[optimizer] * weights, tables)


def is_table(name: str) -> bool:
    """Whether a parameter is one of the tables of a PEER layer's experts."""
    return name.endswith((".experts.down", ".experts.up", "shared_experts.down", "shared_experts.up"))


def table(found: Memory) -> str:
    """Return it in words, GB of 10^9 bytes."""
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "together": found.total,
    }
    said = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in parts.items())
    return f"memory of one process, without activations: {said}; of the weights, tables of experts: " + (
        f"{found.tables / 1e9:,.1f} GB"
    )
