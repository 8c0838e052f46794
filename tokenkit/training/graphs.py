"""Where the graph of a loss begins and ends: at the student's last layer, and where FSDP2 waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tokenkit.structs import HiddenStates, LossTerm


@contextmanager
def graph_from(layer: nn.Module) -> Iterator[None]:
    """Run a body without a graph up to `layer`, its last one, and with one from there on."""

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        torch.set_grad_enabled(True)

    handle = layer.register_forward_pre_hook(begin, prepend=True)  # FSDP2's own hook looks at the mode
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()


def with_frozen_head(states: HiddenStates) -> HiddenStates:
    """Leave the head out of the graph."""
    head = states.head
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    return replace(states, head=replace(head, weight_VD=head.weight_VD.detach(), bias_V=bias_V))


def connected(name: str, term: LossTerm, states: HiddenStates, *, reads_layers: bool) -> LossTerm:
    """Give some totals a gradient of zero to the last hidden states.

    Those that depend on no parameter (nothing to compare in this batch): every rank must take part in the
    backward of every loss. Those that read what lies inside the layers: FSDP2 gathers a layer's weights
    for the backward when a gradient arrives at the layer's end.

    Raises:
        ValueError: a total without a graph is not 0: it would have a gradient, were the head not left out.
    """
    if not torch.is_grad_enabled() or (term.total.requires_grad and not reads_layers):
        return term
    if not term.total.requires_grad and bool((term.total != 0).any()):
        raise ValueError(
            f"loss {name} sends no gradient to the student's layers: losses cannot be compared there, use "
            "gradmag, gradclip:MAX or pcgrad as multitask_aggregation_fn"
        )
    return LossTerm(term.total + 0 * states.hidden_BTD[:1, :1].sum(), term.count)
