"""What experts cost whose tables are cut by columns over processes (`models/expert_tables.py`).

They are never gathered, their gradients are never whole, and what travels is tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenkit.models.expert_tables import is_cut
from tokenkit.optim import is_table


@dataclass(frozen=True, slots=True)
class CutTables:
    """The tables of a model that are cut over ranks; all 0: there are none, or they are gathered."""

    numbers: int = 0
    """Of all ranks."""
    kept: int = 0
    """Bytes that a rank keeps for the backward because it has ids, gates and products of all tokens."""
    received: float = 0
    """Bytes that a rank receives for a micro-batch."""


def cut_tables_of(
    model: nn.Module, experts: Any, ranks: int, tokens: int = 0, itemsize: int = 4
) -> CutTables:
    """Count the tables that `ranks` processes cut by columns.

    Args:
        model: also on the meta device.
        experts: its `peer_config`, None: it has none.
        ranks: processes.
        tokens: of a micro-batch of one rank.
        itemsize: bytes of a number that computes.

    Raises:
        ConfigError: see `models/expert_tables.py`.
    """
    tables = [parameter for name, parameter in model.named_parameters() if is_table(name)]
    if not experts or not tables or ranks == 1:
        return CutTables()
    D, others = tables[0].shape[2], ranks - 1
    if not is_cut(experts.get("sharding", "auto"), D, ranks):
        return CutTables()
    layers = sum(hasattr(module, "query_proj") and hasattr(module, "usage") for module in model.modules())
    picks = experts["num_heads"] * experts["num_experts_per_tok"]
    neurons = picks * experts["expert_hidden_size"]
    columns = 4 * others / ranks * tokens * D * itemsize  # x, y and their gradients, all to all
    chosen = others * tokens * picks * 8  # ids and gates
    products = 4 * others * tokens * neurons * 4  # two sums, each added up and handed round
    return CutTables(
        numbers=sum(table.numel() for table in tables),
        kept=layers * others * tokens * (picks * 8 + neurons * 4),
        received=layers * (columns + chosen + products),
    )
