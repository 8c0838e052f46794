"""What training a model takes of memory, from its shapes alone: a model on the meta device is enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

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
    named = list(model.named_parameters())
    weights = sum(4 * parameter.numel() for _, parameter in named)
    tables = sum(4 * parameter.numel() for name, parameter in named if is_table(name))
    return Memory(weights, weights, optimizer_bytes(named, experts), tables)


def optimizer_bytes(named: Iterable[tuple[str, nn.Parameter]], experts: Mapping[str, Any] | None) -> int:
    """Return what AdamW keeps of parameters, float32: two moments; of tables of experts what was chosen."""
    how = (experts or {}).get("optimizer")
    moments = {"rowwise_adam": 1, "rowwise_adagrad": 0}.get(str(how), 2)
    found = 0
    for name, parameter in named:
        size, has_rows = 4 * parameter.numel(), is_table(name) and how in ROWWISE
        found += moments * size + 4 * len(parameter) if has_rows else 2 * size
    return found


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
