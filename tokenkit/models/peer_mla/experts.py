"""A PEER layer: heads of queries, product keys, and tables of tiny experts (arXiv:2407.04153).

Where tokenkit is installed its kernels do the work; elsewhere a few lines of torch do, a stretch of tokens at
a time, which is enough to run a model and slow to train one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import make_norm

try:
    from tokenkit.kernels.peer_experts import peer_experts
    from tokenkit.kernels.product_key_topk import count_usage, product_key_topk
except ImportError:
    HAS_KERNELS = False
else:
    HAS_KERNELS = True

PLAIN_TOKENS = 128
"""Whose experts' rows are held at once where tokenkit is not installed."""


class ExpertTables(nn.Module):
    """What the neurons of all experts read and write with."""

    spread: Callable[..., Tensor] | None = None
    """Adds up experts where the tables are cut over processes; None: they are whole."""

    def __init__(self, config: Any):
        super().__init__()
        peer = config.peer_config
        shape = peer["num_experts"], peer["expert_hidden_size"], config.hidden_size
        self.down = nn.Parameter(torch.empty(shape))
        self.up = nn.Parameter(torch.empty(shape))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return both tables, [E, M, D]; called, so that hooks that gather parameters see it."""
        return self.down, self.up


class ExpertLayer(nn.Module):
    """Finds each token's experts and adds up what they write."""

    usage: tuple[Tensor, Tensor] | None
    """Where training adds up how often each expert is taken and its gates (`usage.py`); None: nowhere."""

    def __init__(self, config: Any):
        super().__init__()
        peer = config.peer_config
        self.heads, self.picks, self.gate = peer["num_heads"], peer["num_experts_per_tok"], peer["gate"]
        self.activation, self.usage = peer["activation"], None
        sizes, width = peer["product_key_dim"], peer["query_dim"]
        self.query_proj = nn.Linear(config.hidden_size, self.heads * width)
        self.query_norm = make_norm(peer["query_norm"], width, config.layer_norm_eps)
        groups = 1 if peer["share_keys"] else self.heads
        self.keys = nn.ParameterList(
            [nn.Parameter(torch.empty(groups, size, width // len(sizes))) for size in sizes]
        )
        self.experts = None if peer["share_experts"] else ExpertTables(config)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids (int32) and gates (float32) of the experts of x [N, D], both [N, heads, picks]."""
        query = self.query_norm(self.query_proj(x).unflatten(-1, (self.heads, -1)))
        keys = list(self.keys)
        topk = product_key_topk if HAS_KERNELS else plain_topk
        expert, gate = topk(query.to(keys[0].dtype), keys, self.picks, self.gate)
        return expert, gate

    def forward(self, x: Tensor, shared: ExpertTables | None = None) -> Tensor:
        """Return [B, T, D]; `shared` are the tables of a model whose layers share them."""
        flat = x.reshape(-1, x.shape[-1])
        expert, gate = self.route(flat)
        if self.usage is not None and self.training and not _is_recomputed():
            count_usage(expert, gate, *self.usage)
        tables = shared or self.experts
        assert tables is not None
        down, up = tables()
        chosen = expert.flatten(1), gate.flatten(1), self.activation
        if tables.spread is not None:
            return tables.spread(flat, down, up, *chosen).view(x.shape)
        add = peer_experts if HAS_KERNELS else plain_experts
        out = add(flat.to(down.dtype), down, up, *chosen)
        return out.to(x.dtype).view(x.shape)


def _is_recomputed() -> bool:
    """Whether this forward is a part of a backward (gradient checkpointing); torch asks this way too."""
    return torch._C._current_graph_task_id() != -1


def plain_topk(query: Tensor, keys: list[Tensor], picks: int, gate: str) -> tuple[Tensor, Tensor]:
    """Return experts and gates, as `product_key_topk` does."""
    best = expert = query.new_zeros((), dtype=torch.int64)
    for place, (part, key) in enumerate(zip(query.float().chunk(len(keys), -1), keys, strict=True)):
        wide = key.float().expand(part.shape[1], -1, -1)
        found, at = torch.einsum("nhq,heq->nhe", part, wide).topk(picks, -1)
        if place:
            found, where = (best[..., :, None] + found[..., None, :]).flatten(-2).topk(picks, -1)
            at = (expert[..., :, None] * key.shape[1] + at[..., None, :]).flatten(-2).gather(-1, where)
        best, expert = found, at
    if gate == "softmax":
        return expert.int(), best.softmax(-1)
    return expert.int(), best.relu() if gate == "relu" else best.sigmoid()


def plain_experts(
    x: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor, activation: str
) -> Tensor:
    """Return the sum of each token's experts, as `peer_experts` does."""
    parts = []
    for part, ids, factor in zip(*(t.split(PLAIN_TOKENS) for t in (x, expert.long(), gate)), strict=True):
        s = torch.einsum("nd,npmd->npm", part, down[ids])
        s = getattr(torch.nn.functional, activation)(s) * factor.to(s.dtype)[..., None]
        parts.append(torch.einsum("npm,npmd->nd", s, up[ids]))
    return torch.cat(parts) if parts else x
