"""What training a model takes of memory, from its shapes alone: a model on the meta device is enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenkit.optim import ROWWISE, is_table


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


def memory(model: Any, experts: Mapping[str, Any] | None = None) -> Memory:
    """Return what the training of all parameters of a model takes, by AdamW.

    Args:
        model: any module, also on the meta device; shared parameters count once.
        experts: its `peer_config`, whose `optimizer` is that of the tables.
    """
    how = (experts or {}).get("optimizer")
    moments = {"rowwise_adam": 1, "rowwise_adagrad": 0}.get(str(how), 2)
    weights, optimizer, tables = 0, 0, 0
    for name, parameter in model.named_parameters():
        size, has_rows = 4 * parameter.numel(), is_table(name) and how in ROWWISE
        weights += size
        tables += size if is_table(name) else 0
        optimizer += moments * size + 4 * len(parameter) if has_rows else 2 * size
    return Memory(weights, weights, optimizer, tables)


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
