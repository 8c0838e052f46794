"""How evenly training uses the experts of PEER layers: counts on the device, statistics once in a window.

Unevenness is the divergence of the use from an even one, KL(z ‖ uniform) = log E + Σ z log z, nats, with z
the share of each expert in the gates (as He 2024, arXiv:2407.04153, measures it) or in the counts.

Dimensions: E experts of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM

LEAST_MEAN = 4.0
"""Uses of an expert in a window, on average: below, chance alone makes experts look unused or hot."""
SHOWN = 100
"""Experts that are listed by name."""


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """The counters of a model's PEER layers."""

    layers: dict[int, tuple[Tensor, Tensor]]
    """By the layer's number in the model: uses and gates of each expert since the last reset, int64 [E]."""
    every: int
    """Optimizer steps of a window."""
    threshold: float
    """An expert that is used more than so many times the mean is hot."""

    @classmethod
    def of(cls, model: CausalLM) -> ExpertUsage | None:
        """Begin to count in a model whose configuration asks for it; None: it does not, or has no experts.

        The layers count the forwards of training alone, each token once: `experts.py` leaves out those that
        gradient checkpointing repeats.
        """
        settings: Any = getattr(model.config, "peer_config", None)
        if not settings or not settings.get("log_expert_usage"):
            return None
        layers = {}
        device = model.embedding.weight.device
        for number, layer in enumerate(model.layers):
            module: Any
            for module in layer.modules():
                if hasattr(module, "usage") and hasattr(module, "query_proj"):
                    zeros = torch.zeros(settings["num_experts"], dtype=torch.int64, device=device)
                    module.usage = layers[number] = (zeros, zeros.clone())
        return cls(layers, settings["log_freq"], settings["usage_threshold"]) if layers else None

    def counters(self) -> dict[str, Tensor]:
        """Return all counters by a name, to be added up over ranks."""
        return {
            f"{kind}#{number}": counter_E
            for number, pair in self.layers.items()
            for kind, counter_E in zip(("count", "mass"), pair, strict=True)
        }

    def statistics(self, added: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
        """Return `usage_statistics` of each layer, of `counters` added up, and begin the next window."""
        found = {
            number: usage_statistics(added[f"count#{number}"], added[f"mass#{number}"], self.threshold)
            for number in self.layers
        }
        for pair in self.layers.values():
            for counter_E in pair:
                counter_E.zero_()
        return found


def usage_statistics(count_E: Tensor, mass_E: Tensor, threshold: float) -> dict[str, Any]:
    """Return what a window says of one layer, as JSON holds it.

    Args:
        count_E: how often each expert was taken.
        mass_E: the sum of its gates, in any unit.
        threshold: times the mean over all experts, from where on one is hot.
    """
    count_E, mass_E = count_E.double(), mass_E.double()
    E, total = len(count_E), float(count_E.sum())
    mean = total / E
    hot_E = (count_E > threshold * mean).nonzero()[:, 0]
    top = count_E.topk(min(SHOWN, E))
    return {
        "experts": E,
        "experts_used": int((count_E > 0).sum()),
        "coverage": float((count_E > 0).double().mean()),
        "uses": int(total),
        "mean": mean,
        "max_over_mean": float(count_E.max() / mean) if mean else 0.0,
        "unevenness": _unevenness(mass_E),
        "unevenness_of_counts": _unevenness(count_E),
        "gini": _gini(count_E),
        "hot": len(hot_E),
        "hot_experts": [
            [int(e), int(count_E[e])] for e in hot_E[count_E[hot_E].argsort(descending=True)][:SHOWN]
        ],
        "top": [[int(e), int(n)] for n, e in zip(*top, strict=True) if n > 0],
        "is_window_too_small": mean < LEAST_MEAN,
    }


def _unevenness(weight_E: Tensor) -> float:
    total = weight_E.sum()
    if not total > 0:
        return 0.0
    z_E = weight_E / total
    return math.log(len(z_E)) + float(torch.special.xlogy(z_E, z_E).sum())


def _gini(count_E: Tensor) -> float:
    """Return 0 where all are used alike, nearly 1 where one expert gets all."""
    E, total = len(count_E), count_E.sum()
    if not total > 0:
        return 0.0
    rank_E = torch.arange(1, E + 1, dtype=torch.float64, device=count_E.device)
    return float(2 * (rank_E * count_E.sort().values).sum() / (E * total) - (E + 1) / E)


def metrics_of(found: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Return the numbers of metrics.jsonl and of trackers, by the names that others' dashboards have too."""
    values: dict[str, float] = {}
    for number, stats in found.items():
        values[f"expert_usage/layer_{number}_experts_used"] = stats["experts_used"]
        values[f"expert_usage/layer_{number}_coverage"] = stats["coverage"]
        values[f"experts/layer_{number}/experts_used"] = stats["experts_used"]
        values[f"experts/layer_{number}/usage_coverage"] = stats["coverage"]
        values[f"experts/layer_{number}/unevenness"] = stats["unevenness"]
        values[f"experts/layer_{number}/gini"] = stats["gini"]
    values["expert_usage/hot_experts_count"] = sum(stats["hot"] for stats in found.values())
    return values


def too_small(found: dict[int, dict[str, Any]], every: int) -> str | None:
    """Return a warning where a window says little; None: it is large enough."""
    means = [stats["mean"] for stats in found.values() if stats["is_window_too_small"]]
    if not means:
        return None
    return (
        f"expert usage: in {every} steps an expert was used {min(means):.2g} times on average, and below "
        f"{LEAST_MEAN:g} chance alone makes experts look unused or hot: raise log_freq to "
        f"{math.ceil(every * LEAST_MEAN / max(min(means), 1e-9)):,}"
    )
