"""What each of several processes holds of a model in training, from its shapes alone, by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenkit.optim import ROWWISE, is_table
from tokenkit.training.counting import held
from tokenkit.training.expert_costs import cut_tables_of


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of one process; activations depend on the batch and are not here."""

    tables: float
    """Weights of the tables of experts."""
    weights: float
    """All others."""
    gradients: float
    optimizer: float
    gathered: float
    """Two layers, and what is in no layer, in the type that computes."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.tables + self.weights + self.gradients + self.optimizer + self.gathered


def share(model: Any, ranks: int, *, itemsize: int = 4, adds_up: bool = False) -> Share:
    """Return what one of `ranks` processes holds while all parameters are trained by AdamW.

    Args:
        model: a causal language model of transformers, float32, also on the meta device.
        ranks: over which it is sharded.
        itemsize: bytes of a number that computes.
        adds_up: whether a step has several micro-batches, whose gradients FSDP2 adds up whole.

    Raises:
        ConfigError: tables that so many processes cannot cut.
    """
    peer = getattr(model.config, "peer_config", None)
    all_of_it, cut = held(model, peer), cut_tables_of(model, peer, ranks)
    is_cut = cut.numbers > 0
    sharded = all_of_it.gradients - 4 * cut.numbers
    # one number for a row cannot be cut by columns: every process has all of them
    rows = sum(4 * len(p) for name, p in model.named_parameters() if is_table(name))
    rows = rows if is_cut and (peer or {}).get("optimizer") in ROWWISE else 0
    return Share(
        tables=all_of_it.tables / ranks,
        weights=(all_of_it.weights - all_of_it.tables) / ranks,
        gradients=4 * cut.numbers / ranks + (sharded if adds_up else sharded / ranks),
        optimizer=(all_of_it.optimizer - rows) / ranks + rows,
        gathered=itemsize * _gathered(model, is_cut=is_cut) if ranks > 1 else 0,
    )


def _gathered(model: nn.Module, *, is_cut: bool) -> int:
    """Return the numbers of the two largest layers and of all that is in no layer."""
    layers = next((part for part in model.modules() if isinstance(part, nn.ModuleList)), nn.ModuleList())
    sizes = sorted(_numbers(layer, is_cut=is_cut) for layer in layers)
    return sum(sizes[-2:]) + _numbers(model, is_cut=is_cut) - sum(sizes)


def _numbers(module: nn.Module, *, is_cut: bool) -> int:
    named = module.named_parameters(prefix="module")
    return sum(parameter.numel() for name, parameter in named if not (is_cut and is_table(name)))


def table(found: Mapping[int, Share]) -> str:
    """Return shares side by side, a column for each number of processes, GB of 10^9 bytes."""
    parts = {
        "tables of experts": "tables", "other weights": "weights", "gradients": "gradients",
        "optimizer": "optimizer", "gathered": "gathered", "together": "total",
    }  # fmt: skip
    lines = [f"{'GB of one process, of':<22}" + "".join(f"{ranks:>8}" for ranks in found)]
    for words, name in parts.items():
        lines.append(
            f"  {words:<20}" + "".join(f"{getattr(one, name) / 1e9:>8.1f}" for one in found.values())
        )
    return "\n".join([*lines, "without activations, which grow with the batch"])
